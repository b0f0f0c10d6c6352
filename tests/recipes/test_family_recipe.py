"""The recipe family: equal compute, what is measured of a run, and claims that are computed from the runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.config import parse_settings
from resilin.config.load import apply_override
from resilin.models.settings import ModelContext
from resilin.recipes.cells import cells
from resilin.recipes.family.analysis import APART, SIX, TITLES, Family, Size, analyse, at_operations, best_cut
from resilin.recipes.family.measure import train_and_measure
from resilin.recipes.family.operations import operations
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.recipe import load_recipe
from resilin.run.settings import RunSettings

RECIPE = Path(__file__).parents[2] / "recipes" / "family"
ALONE = ("plain", *APART, "matformer", "ernie5", "chain_of_model", "loopformer")
SHORT = ("train.steps=2", "train.batch_size=2", "evaluation.batches=1")


def test_families_take_the_operations_of_the_plain_model():
    found = {}
    for cell in cells(load_recipe(RECIPE), "cpu", seeds=[1]):
        if cell.arm in ALONE:  # the others train earlier runs first
            found[cell.arm] = operations(cell.settings, cell.settings.model.build(ModelContext(1, 256)))
    plain, apart = found.pop("plain"), sum(found.pop(arm) for arm in APART)
    token = 2 * (4 * (4 * 64 * 64 + 3 * 64 * 192) + 64 * 256) + 4 * 4 * 64 * 32.5
    assert plain == 400 * 16 * 64 * 3 * token
    for name, count in {**found, "apart": apart}.items():
        assert count / plain == pytest.approx(1, abs=0.03), name


def measured(arm: str, folder: Path, *overrides: str) -> dict[str, float]:
    cell = next(cell for cell in cells(load_recipe(RECIPE), "cpu", seeds=[0]) if cell.arm == arm)
    tree = copy.deepcopy(dict(cell.asked))
    for one in (*SHORT, *overrides):
        apply_override(tree, one)
    _, outcome = train_and_measure(parse_settings(RunSettings, tree, arm), folder, ())
    assert outcome.reason == "completed"
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    told: dict[str, float] = [line["metrics"] for line in lines if line.get("name") == "family"][-1]
    return told


def test_every_size_of_a_run_is_measured(tmp_path):
    told = measured("matformer", tmp_path / "run")
    sizes = [name.split("/")[1] for name in told if name.endswith("/loss")]
    assert sizes == ["0.25", "0.5", "1"]
    assert told["size/0.25/parameters"] < told["size/0.5/parameters"] < told["size/1/parameters"]
    assert told["size/1/agreement"] == 1
    assert told["memory/family"] == 4 * told["size/1/parameters"]
    assert told["memory/apart"] == 4 * sum(told[f"size/{one}/parameters"] for one in sizes)
    assert told["extraction/bytes"] > 4 * told["size/0.25/parameters"]
    assert told["operations"] % (2 * 64 * 3) == 0


@pytest.mark.slow
def test_earlier_runs_count(tmp_path, monkeypatch):
    """A router's run starts from a plain one, joined experts from a public model and each owner's run."""
    data = (RECIPE.parents[1] / ".data").resolve()
    monkeypatch.chdir(tmp_path)
    if data.is_dir():
        (tmp_path / ".data").symlink_to(data)
    plain = measured("plain", tmp_path / "plain")["operations"] / 2
    told = measured("nemotron_elastic", tmp_path / "elastic", "model.model.run.train.steps=3")
    assert {name.split("/")[1] for name in told if name.startswith("size/")} == {"0.5", "0.75", "1"}
    # The earlier run has 8 times the rows; of two steps the first is the whole under masks, and a teacher reads along.
    assert told["operations"] / plain == pytest.approx(3 * 8 + 2 * 4 / 3, rel=0.25)


def study(**changed: dict[str, float]) -> Study:
    """Sizes of 1, 2 and 4 operations: cuts are bad, six families good, models trained alone between."""
    base = {"plain": (3.0, 2.6, 2.0), **dict.fromkeys(SIX, (2.2, 2.1, 2.0))}
    trials = []

    def trial(arm: str, sizes: dict[str, tuple[float, float]], seed: int, more: dict[str, float]) -> Trial:
        metrics: dict[str, float | None] = {
            "family/operations": 100.0, "family/memory/family": 4.0, "family/memory/apart": 7.0,
            "family/extraction/seconds": 0.02, "family/extraction/copy_seconds": 0.01,
        }  # fmt: skip
        for name, (flops, loss) in sizes.items():
            numbers = {"flops": flops, "loss": loss, "parameters": 10 * flops, "agreement": 0.9}
            metrics |= {f"family/size/{name}/{key}": value for key, value in numbers.items()}
        record = RunRecord(hash="x", status="finished", evaluations=(Evaluation(step=1, metrics=metrics | more),))
        return Trial("main", arm, {}, seed, record)

    for seed in range(3):
        for arm, losses in base.items():
            sizes = {name: (flops, loss) for name, flops, loss in zip("abc", (1.0, 2.0, 4.0), losses, strict=True)}
            trials.append(trial(arm, sizes, seed, {f"family/{k}": v for k, v in changed.get(arm, {}).items()}))
        for arm, flops, loss in zip(APART, (1.0, 2.0, 4.0), (2.4, 2.3, 2.2), strict=True):
            trials.append(trial(arm, {"whole": (flops, loss)}, seed, {"family/operations": 33.0}))
    return Study("family", "cpu", tuple(trials), None)


def holds(found: Study) -> dict[str, bool]:
    return {claim.name: claim.holds for claim in analyse(found).claims}


def test_claims_hold_where_the_figures_say_so():
    found = holds(study())
    assert len(found) == 2 + 3 * len(SIX)
    assert all(found.values())


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({"operations": 104.0}, "equal compute"),
        ({"memory/family": 8.0}, "memory"),
        ({"size/a/loss": 3.1, "size/b/loss": 1.6}, "matformer: cuts"),
        ({"size/c/loss": 2.2}, "matformer: whole"),
        ({"size/a/loss": 2.9, "size/b/loss": 2.5}, "matformer: apart"),
    ],
)
def test_a_claim_fails_by_its_own_figure(changed, fails):
    found = holds(study(matformer=changed))
    assert [name for name, held in found.items() if not held] == [fails]


def test_a_family_that_a_seed_lacks_is_named_and_not_judged():
    whole = study()
    found = analyse(Study("family", "cpu", tuple(t for t in whole.trials if (t.arm, t.seed) != ("ernie5", 2)), None))
    assert found.notes == ("Not trained to the end with all seeds: ERNIE 5.0.",)
    assert not [claim for claim in found.claims if claim.name.startswith("ernie5")]
    assert {row[0] for row in found.tables[0].rows} == {title for name, title in TITLES.items() if name != "ernie5"}


def test_nothing_finished_is_no_error():
    assert analyse(Study("family", "cpu", (), None)).claims == ()


@given(st.floats(0.5, 8.0))
def test_losses_between_sizes_lie_between_theirs(flops):
    family = Family(tuple(Size("", f, f, loss, 1) for f, loss in ((1, 3.0), (2, 2.5), (4, 2.4))), 1, 1, 1, (1, 1))
    loss = at_operations(family, flops)
    if not 1 / 1.05 <= flops <= 4 * 1.05:
        assert loss is None
    else:
        assert loss is not None
        below = [size.loss for size in family.sizes if size.flops <= flops] or [3.0]
        above = [size.loss for size in family.sizes if size.flops >= flops] or [2.4]
        assert above[0] <= loss <= below[-1]
        assert at_operations(family, 2) == 2.5


def test_a_size_is_compared_with_the_best_cut_that_is_as_cheap():
    cuts = tuple(Size(name, flops, 1, loss, 1) for name, flops, loss in (("x", 1, 3.0), ("y", 1.5, 3.5), ("z", 4, 2.0)))
    family = Family(cuts, 1, 1, 1, (1, 1))
    assert [best_cut(family, flops).name for flops in (0.5, 1, 2, 4)] == ["x", "x", "x", "z"]
