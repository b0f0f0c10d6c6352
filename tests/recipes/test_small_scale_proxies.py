"""The recipe's analysis on planted runs: claims hold where the effect is planted, and fail where its opposite is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from resilin.models.flops import parameter_counts
from resilin.recipes.cells import Cell, cells
from resilin.recipes.findings import Evaluation, Findings, RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe
from resilin.recipes.small_scale_proxies import analyse, attention

FOLDER = Path(__file__).parents[2] / "recipes" / "small-scale-proxies"
L0 = 5.5
BIGRAM = 2.2
BOWL = {"none": 0.10, "qk_norm": 0.06, "standard": 0.06, "coupled_decay": 0.12}


def planted(cell: Cell) -> RunRecord:
    """A run in which everything the paper reports is so."""
    settings = cell.settings.model_dump(mode="json")
    optimizer, model = settings["optimizer"]["optimizer"], cell.settings.model
    lr, eps = optimizer["lr"], optimizer["eps"]
    size = parameter_counts(model.model_copy(update={"vocab_size": 260})).non_embedding
    distance = math.log10(lr / 1e-2)
    bowl = BOWL.get(cell.arm, 0.06) * (1 + 0.2 * model.layers) * (1 + 0.05 * math.log10(size))
    bowl *= {0.01: 1.5, 0.25: 0.5}.get(optimizer["schedule"]["warmup"], 1.0)
    loss = 2.0 + bowl * distance**2 + 0.001 * cell.seed
    if cell.arm.startswith("mup"):
        loss += 0.01
    if cell.arm == "qk_norm_width":
        loss += 0.02
    if cell.arm == "transplant":
        loss += 0.1 * math.log10(model.qk_norm_kappa)
    if cell.arm == "tiny_loss" or cell.grid == "eps_high_lr":
        loss += {1e-6: 0.3, 1e-8: 0.1, 1e-15: 0.0}[eps]
    normed = cell.arm != "none"
    logit = 4.0 * (lr / 3e-4) ** (0.2 if normed else 1.4) * (size / 2e5) ** (0.1 if normed else 0.5)
    loss += 1.0 if logit > 1e4 else 0.0
    drift = 50.0 * lr if cell.arm == "no_decay_no_z_loss" else 0.1
    steps = settings["train"]["steps"]
    at = list(range(1, steps + 1, 20))
    return RunRecord(
        hash="x",
        status="finished",
        evaluations=(Evaluation(step=0, metrics={"nll": L0}), Evaluation(step=steps, metrics={"nll": loss})),
        series={
            "probe/attention_logit_max/0": tuple((s, logit) for s in at),
            "probe/log_z": tuple((s, drift) for s in at),
            "probe/gradient_rms/blocks.0.mlp.up.weight": tuple((s, 1e-3 * (size / 1e5) ** -0.5) for s in at),
            "grad_norm": tuple((s, 0.5) for s in at),
            "update_rms/blocks.0.mlp.up.weight": tuple((s, 0.2) for s in at),
        },
        non_embedding=size,
        settings=settings,
    )


def study(plant: Callable[[Cell], RunRecord] = planted, preset: str = "cpu") -> Study:
    recipe = load_recipe(FOLDER)
    found = cells(recipe, preset, overrides=["train.device=cpu"])
    trials = tuple(Trial(c.grid, c.arm, dict(c.axes), c.seed, plant(c)) for c in found)
    return Study("small-scale-proxies", preset, trials, recipe)


@pytest.fixture(scope="module", autouse=True)
def counted():
    """A bigram model of a known loss; the planted runs have no data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "bigram_loss", lambda record: BIGRAM)
        yield


def verdicts(findings: Findings) -> dict[str, bool]:
    return {claim.name: claim.holds for claim in findings.claims}


@pytest.fixture(scope="module")
def found() -> Findings:
    return analyse(study())


def test_every_planted_effect_is_found(found):
    said = verdicts(found)
    assert [name for name, holds in said.items() if not holds] == []
    assert len(said) >= 20
    assert len(said) == len(found.claims)  # names tell claims apart


OPPOSITES = {"none": "qk_norm", "qk_norm": "none", "coupled_decay": "standard", "no_decay": "no_decay_no_z_loss",
             "no_decay_no_z_loss": "no_decay",
             "qk_norm_width": "standard"}  # fmt: skip


def swapped(cell: Cell) -> RunRecord:
    """The runs of an arm under the name of its opposite."""
    arm = OPPOSITES.get(cell.arm, cell.arm)
    record = planted(replace(cell, arm=arm))
    if cell.grid == "qk_norm_over":
        return planted(replace(cell, arm="standard" if cell.arm == "qk_norm_width" else "qk_norm_width"))
    if cell.grid == "decay":
        return planted(replace(cell, arm="standard" if cell.arm == "coupled_decay" else "coupled_decay"))
    return record


def test_no_effect_is_found_where_arms_are_swapped():
    said = verdicts(analyse(study(swapped)))
    for name in (
        "qk-norm lowers sensitivity",
        "qk-norm trains at the top rate",
        "independent decay lowers sensitivity",
        "z-loss holds output logits",
        "qk-norm over the width is worse",
    ):
        assert said[name] is False, name


def flat(cell: Cell) -> RunRecord:
    """Runs in which nothing makes a difference."""
    record = planted(cell)
    last = record.evaluations[-1].model_copy(update={"metrics": {"nll": 2.0}})
    series = {name: tuple((s, 1.0) for s, _ in points) for name, points in record.series.items()}
    return record.model_copy(update={"evaluations": (record.evaluations[0], last), "series": series})


def test_where_nothing_differs_only_harmlessness_and_absence_of_effects_hold():
    said = verdicts(analyse(study(flat)))
    assert {name for name, holds in said.items() if holds} == {
        "z-loss is harmless",
        "small models foretell the logit",
        *(f"muParam ({kind}) is no remedy" for kind in ("simple", "intermediate", "full")),
        *(f"muParam ({kind}) keeps the best rate" for kind in ("simple", "intermediate", "full")),
    }


def test_one_seed_against_the_claim_breaks_it():
    def one_off(cell: Cell) -> RunRecord:
        return planted(replace(cell, arm=OPPOSITES.get(cell.arm, cell.arm)) if cell.seed == 1 else cell)

    findings = analyse(study(one_off))
    claim = next(c for c in findings.claims if c.name == "qk-norm lowers sensitivity")
    assert not claim.holds
    assert "positive in 2 of 3 seeds" in claim.evidence


def test_a_diverged_run_counts_as_untrained():
    def nan_at_top(cell: Cell) -> RunRecord:
        record = planted(cell)
        if cell.arm == "none" and cell.axes.get("lr") == 0.3:
            return record.model_copy(update={"status": "non-finite", "stopped_at": 77})
        return record

    rows = {row.name: row.value for row in analyse(study(nan_at_top)).rows}
    before = {row.name: row.value for row in analyse(study()).rows}
    name = "LR sensitivity, without qk-norm"
    losses = [planted(t) for t in cells(load_recipe(FOLDER), "cpu") if t.arm == "none" and t.axes.get("lr") == 0.3]
    assert rows[name] - before[name] == pytest.approx((L0 - losses[0].final["nll"]) / 7, abs=2e-3)


@pytest.mark.parametrize(("loss", "holds"), [(1.9, False), (2.2, True), (2.5, False)])
def test_transplanted_logits_are_held_against_the_bigram_model(monkeypatch, loss, holds):
    # planted: 2.0 at kappa 1 and 2.4 at 1e4
    monkeypatch.setattr(attention, "bigram_loss", lambda record: loss)
    findings = analyse(study())
    assert verdicts(findings)["large logits are worse than a bigram model"] is holds
    assert next(row.value for row in findings.rows if "bigram" in row.name) == loss


def test_width_and_depth_are_compared_over_the_rates_that_both_have():
    def bad_between(cell: Cell) -> RunRecord:
        record = planted(cell)
        last = record.evaluations[-1]
        if cell.grid == "width" and cell.axes["lr"] in (3e-3, 3e-2):  # rates that depth is not tried at
            last = last.model_copy(update={"metrics": {"nll": 5.0}})
        return record.model_copy(update={"evaluations": (record.evaluations[0], last)})

    assert verdicts(analyse(study(bad_between)))["depth raises sensitivity faster"]


def test_the_planted_power_law_is_extrapolated_to_its_crossing(found):
    table = next(t for t in found.tables if t.title.startswith("Largest |attention logit| of block 0 without"))
    for row in table.rows:
        lr = float(row[0])
        crossing = 2e5 * (1e4 / (4.0 * (lr / 3e-4) ** 1.4)) ** 2
        assert float(str(row[-1]).split()[0]) == pytest.approx(crossing, rel=0.06)


def test_the_papers_grids_are_understood_too():
    said = verdicts(analyse(study(preset="paper")))
    assert "small models foretell the logit" in said
    assert "muParam (full) keeps the best rate" in said
