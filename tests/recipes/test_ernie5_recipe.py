"""The recipe ernie5: its settings, its data, and its claims, which are computed from the runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resilin.data.settings import SourceContext
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.settings import ModelContext
from resilin.nested import Budget, cost
from resilin.nested.elastic_pretraining import elastic_in
from resilin.nouns import Batch
from resilin.recipes.cells import cells, check
from resilin.recipes.ernie5.analysis import TITLES, analyse
from resilin.recipes.ernie5.digit_tokens import DigitTokens, image_tokens
from resilin.recipes.ernie5.measured import measured_choice, measured_use
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "ernie5"
TEXTS = ["top_k=2", "top_k=1", "experts=8", "skip=1", "experts=8,skip=1,top_k=2"]
PLAIN = dict(zip(["", *TEXTS], [0.15, 0.4, 0.8, 0.5, 0.3, 0.9], strict=True))
ELASTIC = dict(zip(["", *TEXTS], [0.16, 0.18, 0.3, 0.18, 0.17, 0.25], strict=True))
GOOD = {
    "plain": PLAIN,
    "elastic": ELASTIC,
    "depth": PLAIN | {"skip=1": 0.2},
    "width": PLAIN | {"experts=8": 0.2},
    "sparsity": PLAIN | {"top_k=1": 0.3},
    "small": {"": 0.4},
}


def study(**changed: dict[str, float]) -> Study:
    trials = []
    for grid in ("digits", "text"):
        for arm, told in GOOD.items():
            losses = told | changed.get(arm, {})
            if grid == "text" and arm not in ("plain", "elastic"):
                continue
            for seed in range(3):
                metrics: dict[str, float | None] = {
                    (f"loss_at_{text}" if text else "loss"): value + 0.001 * seed for text, value in losses.items()
                }
                metrics |= {"measured/cost/flops of the run": 2.0, "measured/cost/flops": 1.0}
                metrics["measured/cost/parameters"] = 4.0
                for text in TEXTS:
                    metrics |= {f"measured/cost/flops/{text}": 0.5, f"measured/cost/parameters/{text}": 2.0}
                metrics |= {f"measured/use/entropy/all/{layer}": 0.9 for layer in range(2)}
                record = RunRecord(
                    hash="x",
                    status="finished",
                    evaluations=(Evaluation(step=100, metrics=metrics),),
                    settings={"objective": {"evaluated": [] if arm == "small" else TEXTS}},
                )
                trials.append(Trial(grid, arm, {}, seed, record))
    return Study("ernie5", "cpu", tuple(trials), None)


def holds(found) -> dict[str, bool]:
    return {claim.name: claim.holds for claim in found.claims}


def test_all_claims_hold_where_the_figures_say_so():
    found = analyse(study())
    assert all(holds(found).values())
    assert len(found.claims) == 3 + 3 + len(TEXTS)
    losses = {row[0]: row for row in found.tables[0].rows}
    assert losses[TITLES["plain"]][1] == pytest.approx(0.151)
    assert losses[TITLES["small"]][-2] == pytest.approx(0.401)
    assert [len(plot.lines) for plot in found.plots] == [2, 2]
    assert any("entropy" in table.title for table in found.tables)


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({"elastic": {"": 0.2}}, {"whole model"}),
        ({"elastic": {"top_k=1": 0.41}}, {"one choice"}),
        ({"elastic": {TEXTS[-1]: 0.5}}, {"all axes"}),
        ({"depth": {"skip=1": 0.31}}, {"depth alone"}),
        ({"width": {"experts=8": 0.6}}, {"width alone"}),
        ({"sparsity": {"top_k=1": 0.9}}, {"sparsity alone"}),
        ({"elastic": {"skip=1": 0.31}}, {"text, skip=1"}),
    ],
)
def test_a_claim_fails_where_its_figures_do(changed, fails):
    assert {name for name, held in holds(analyse(study(**changed))).items() if not held} == fails


def test_runs_that_did_not_end_are_told():
    assert analyse(Study("ernie5", "cpu", (), None)).notes


def test_every_cell_of_every_preset_can_be_trained():
    recipe = load_recipe(RECIPE)
    check(recipe)
    arms = {cell.arm: cell.settings for cell in cells(recipe, "cpu") if cell.grid == "digits"}
    flops, model = {}, {}
    for name in ("elastic", "small"):
        objective = elastic_in(arms[name].objective)
        assert objective is not None
        model[name] = arms[name].model._with_vocabulary(ModelContext(0, 256))
        loss = objective.build()
        drawn = (loss.drawn_at(0, step, model[name]) for step in range(arms[name].train.steps))
        flops[name] = sum(cost(model[name], wanted).flops for wanted in drawn)
    assert flops["small"] == pytest.approx(flops["elastic"], rel=0.03)
    smallest = cost(model["elastic"], Budget.parse(TEXTS[-1]))
    assert smallest.parameters == cost(model["small"], Budget()).parameters
    plain = elastic_in(arms["plain"].objective)
    assert plain is not None
    assert plain.sampler.full_probability == 1


def test_the_model_of_the_paper_has_the_paper_s_parameters():
    (settings,) = {
        cell.arm: cell.settings.model for cell in cells(load_recipe(RECIPE), "paper") if cell.arm == "plain"
    }.values()
    told = cost(settings._with_vocabulary(ModelContext(0, 32000)), Budget())
    embedding = told.parameters - told.non_embedding
    assert told.non_embedding == pytest.approx(3.2e9, rel=0.03)
    assert told.active - embedding == pytest.approx(454e6, rel=0.03)


def test_digits_are_sixteen_bytes_and_one_label():
    pytest.importorskip("sklearn")
    source = DigitTokens(held_out={"fraction": 0.2}).build(SourceContext(split="validation", batch_size=4))
    batch = source.fetch(0, range(4))
    assert batch["tokens"].shape == (4, 16)
    assert int(batch["tokens"].max()) < 256
    assert (batch["labels"][:, :-1] == -100).all()
    assert set(batch["labels"][:, -1].tolist()) <= set(range(10))
    pixels = torch.zeros(1, 1, 8, 8)
    pixels[0, 0, 0, :4] = torch.tensor([0.0, 0.3, 0.6, 1.0])
    assert image_tokens(pixels)[0, :2].tolist() == [0 + 1 * 4 + 2 * 16 + 3 * 64, 0]


def test_choices_and_uses_are_measured():
    moe = MoESettings(experts=4, experts_per_token=2, expert_size=4)
    model = Decoder(DecoderSettings(vocab_size=20, hidden_size=8, layers=3, heads=2, moe=moe, init_std=0.4))
    rows = torch.randint(0, 20, (4, 2, 9), generator=torch.Generator().manual_seed(0))
    batches = [Batch(torch.arange(2), {"tokens": one[:, :-1], "labels": one[:, 1:]}) for one in rows]
    found = measured_choice(model, batches, Budget(skip=(1,), experts=2, top_k=1))
    assert set(found) == {
        "deployed/best plan, most used",
        "deployed/worst plan, most used",
        "deployed/best plan, first",
    }
    use = measured_use(model, {"a": batches[:2], "b": batches[2:]})
    assert {name.split("/")[1] for name in use} == {"entropy", "overlap"}
    assert len(use) == 3 * 3 + 3
    assert all(0 <= value <= 1 for value in use.values())
