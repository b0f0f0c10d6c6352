"""The recipe bone: its data, its base and its claims, which are computed from the runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resilin.data.settings import SourceContext
from resilin.keys import Keys
from resilin.models.settings import ModelContext
from resilin.objective.next_token import NextToken
from resilin.recipes.bone import analyse
from resilin.recipes.bone.data import Adaptation, AdaptationLoss
from resilin.recipes.cells import cells, check
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "bone"
RATES = (1e-3, 3e-3)


def trial(arm: str, lr: float, seed: int, loss: float, original: float = 2.0, early: float = 2.0) -> Trial:
    record = RunRecord(
        hash="x",
        status="finished",
        evaluations=(
            Evaluation(step=0, metrics={"loss": 3.0, "original": 1.0}),
            Evaluation(step=100, metrics={"loss": loss, "original": original}),
        ),
        series={"loss": tuple((step, early if 40 <= step <= 60 else 9.0) for step in range(1, 101))},
        parameters=1000,
    )
    return Trial("adapt", arm, {"lr": lr}, seed, record)


def study(**arms: dict) -> Study:
    trials = []
    for arm, given in arms.items():
        for seed in range(3):
            wobble = 0.001 * seed
            trials.append(
                trial(arm, RATES[0], seed, given["loss"] + wobble, given["original"] + wobble, given["early"])
            )
            trials.append(trial(arm, RATES[1], seed, given["loss"] + 1.0))
    return Study("bone", "cpu", tuple(trials), None)


GOOD = {
    "lora": {"loss": 1.5, "original": 2.0, "early": 2.5},
    "miss": {"loss": 1.6, "original": 2.2, "early": 2.0},
    "bat_col": {"loss": 1.4, "original": 2.3, "early": 2.2},
}


def holds(found) -> dict[str, bool]:
    return {claim.name: claim.holds for claim in found.claims}


def test_each_claim_follows_its_figures() -> None:
    assert holds(analyse(study(**GOOD))) == {
        "quick start": True,
        "bat <= miss": True,
        "bat < lora": True,
        "miss < lora": False,
        "miss forgets more than lora": True,
        "bat_col forgets more than lora": True,
    }
    turned = {"lora": GOOD["bat_col"], "miss": GOOD["bat_col"], "bat_col": {**GOOD["lora"], "original": 1.0}}
    assert not any(holds(analyse(study(**turned))).values())


def test_figures_are_those_of_the_best_learning_rate_and_an_edge_is_told() -> None:
    found = analyse(study(**GOOD))
    rows = {row.name: row for row in found.rows}
    assert rows["test loss on the new task, MiSS"].value == pytest.approx(1.601)
    assert rows["loss on the old task before adaptation"].value == 1.0
    assert "best learning rate of MiSS, 0.001, is at the edge" in " ".join(found.notes)


def test_a_rate_at_which_a_seed_failed_is_not_chosen() -> None:
    given = study(**GOOD)
    failed = [t for t in given.trials if t.arm == "lora" and t.axes["lr"] == RATES[0] and t.seed == 1]
    left = tuple(
        Trial(t.grid, t.arm, t.axes, t.seed, t.record.model_copy(update={"status": "non-finite"})) if t in failed else t
        for t in given.trials
    )
    rows = {row.name: row for row in analyse(Study("bone", "cpu", left, None)).rows}
    assert rows["test loss on the new task, LoRA"].value == pytest.approx(2.5)


def test_the_recipe_fits_and_its_arms_have_the_same_number_of_parameters() -> None:
    recipe = load_recipe(RECIPE)
    check(recipe)
    one = {cell.arm: cell.settings.model for cell in cells(recipe, "cpu", seeds=(0,))}
    counts = {}
    for arm, settings in one.items():
        from resilin.adapt.attach import attach, trainable_count

        base = settings.model.settings(seed=3).model.build(ModelContext(0, 260))
        attach(base, settings.adapters)
        counts[arm] = trainable_count(base)
        assert settings.model.settings(seed=3).seed == 0  # one base for all seeds
    assert counts["lora"] == counts["rslora"] == counts["miss"] == counts["bat_col"]
    assert counts["lora"] < counts["dora"] < 1.07 * counts["lora"]


@pytest.fixture
def source(tmp_path: Path) -> Adaptation:
    common = {"bytes": 60_000, "sequence_length": 32, "cache": str(tmp_path)}
    library = {"use": "resilin.recipes.standard_library:StandardLibrary"}
    return Adaptation.model_validate({"target": common, "original": {**library, **common}})


def test_held_out_batches_hold_both_tasks_and_the_loss_tells_them_apart(source: Adaptation) -> None:
    from resilin.models.decoder_settings import DecoderSettings

    train = source.build(SourceContext(0, "train", 4))
    both = source.build(SourceContext(0, "validation", 4))
    batch = both.fetch(0, range(4))
    assert train.fetch(0, range(4)).get("original") is None
    assert batch["original"].tolist() == [False] * 4 + [True] * 4
    model = DecoderSettings(vocab_size=train.vocab_size, hidden_size=16, layers=1, heads=2).build(ModelContext(0))
    loss, plain = AdaptationLoss().build(), NextToken().build()
    got = loss(model, batch, None)
    for rows, value in (((0, 4), got.sum / got.units), ((4, 8), got.logs["original"].value())):
        alone = plain(model, batch.rows(*rows), None)
        assert float(torch.as_tensor(value).detach()) == pytest.approx(
            float((alone.sum / alone.units).detach()), rel=1e-6
        )
    first = train.fetch(0, range(4))
    keys = Keys(0, 0, first.slots_B)
    assert torch.equal(loss(model, first, keys).sum, plain(model, first, keys).sum)
