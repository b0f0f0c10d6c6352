"""The recipe's analysis counts work by the schedule, time by the log, and says when a claim does not hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resilin.data.settings import SourceContext
from resilin.recipes.cells import cells
from resilin.recipes.findings import Evaluation, RunRecord, Study, Trial
from resilin.recipes.multigrid import Curve, PackagedClips, analyse, curve
from resilin.recipes.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "multigrid"


def record_of(cell: Any, accuracies: list[float], seconds: float) -> RunRecord:
    """A run of a cell that took `seconds` a step and was evaluated evenly."""
    steps = cell.settings.train.steps
    at = [round(steps * (k + 1) / len(accuracies)) for k in range(len(accuracies))]
    return RunRecord(
        hash="x",
        status="finished",
        evaluations=tuple(Evaluation(step=s, metrics={"top1": a}) for s, a in zip(at, accuracies, strict=True)),
        series={"seconds": tuple((step + 1, seconds) for step in range(steps))},
        settings=cell.settings.model_dump(mode="json"),
    )


def study_of(accuracies: dict[str, list[float]], seconds: dict[str, float]) -> Study:
    trials = []
    for cell in cells(load_recipe(RECIPE), "cpu"):
        record = record_of(cell, accuracies[cell.arm], seconds[cell.arm])
        trials.append(Trial(cell.grid, cell.arm, cell.axes, cell.seed, record))
    return Study("multigrid", "cpu", tuple(trials), None)


GOOD = {
    "plain": [0.3, 0.5, 0.6, 0.8],
    "multigrid": [0.5, 0.7, 0.8, 0.81],
    "longer": [0.5, 0.7, 0.8, 0.8],
    "short": [0.5, 0.7],
    "coarse": [0.5, 0.6],
}
LONGER = ("as accurate, longer", "half the work, longer", "half the time, longer")
CLAIMS = (
    *LONGER,
    "as accurate",
    "half the work",
    "half the time",
    "better than a shorter plain run",
    "coarse only is worse",
)


def test_claims_follow_from_the_runs() -> None:
    even = dict.fromkeys(GOOD, 0.1)
    held = {claim.name: claim.holds for claim in analyse(study_of(GOOD, even)).claims}
    assert held == dict.fromkeys(CLAIMS, True)
    slow = analyse(study_of(GOOD, {**even, "multigrid": 0.5}))
    assert {c.name for c in slow.claims if not c.holds} == {"half the time"}
    slow = analyse(study_of(GOOD, {**even, "longer": 0.5}))
    assert {c.name for c in slow.claims if not c.holds} == {"half the time, longer"}
    bad = {
        **GOOD,
        "multigrid": [0.5, 0.6, 0.7, 0.7],
        "longer": [0.5, 0.6, 0.7, 0.7],
        "short": [0.6, 0.7],
        "coarse": [0.6, 0.75],
    }
    held = {claim.name: claim.holds for claim in analyse(study_of(bad, even)).claims}
    assert not any(held.values())
    assert "never reached" in next(c.evidence for c in analyse(study_of(bad, even)).claims if c.name == "half the work")


def test_work_is_what_the_schedule_processes() -> None:
    plain, multigrid = (
        next(c for c in cells(load_recipe(RECIPE), "cpu") if c.grid == "video" and c.arm == arm)
        for arm in ("plain", "multigrid")
    )
    short = next(c for c in cells(load_recipe(RECIPE), "cpu") if c.arm == "short")
    ours, theirs, same = (curve(record_of(cell, [0.5, 0.6], 1.0)) for cell in (multigrid, plain, short))
    assert same.cost[-1] == pytest.approx(ours.cost[-1], rel=1e-3), "no more work than multigrid"
    full = plain.settings.train.batch_size * 8 * 48 * 48
    assert theirs.cost[-1] == plain.settings.train.steps * full
    assert theirs.cost[-1] / ours.cost[-1] == pytest.approx(3.4, abs=0.1)
    assert ours.cost[-1] / multigrid.settings.train.steps == pytest.approx(full, rel=0.05), "steps cost the same"
    assert ours.seconds[-1] == multigrid.settings.train.steps


def test_a_single_lucky_evaluation_is_not_the_goal_reached() -> None:
    found = Curve((1.0, 2.0, 3.0, 4.0), (10.0, 20.0, 30.0, 40.0), (0.5, 0.8, 0.6, 0.8))
    assert found.to(0.75) == (4.0, 40.0)
    assert found.to(0.55) == (2.0, 20.0)
    assert found.to(0.9) is None


@pytest.mark.parametrize("preset", ["cpu", "gpu", "paper"])
def test_every_arm_takes_the_steps_of_its_schedule(preset: str) -> None:
    from resilin.multigrid.source import Multigrid
    from resilin.vision.grid import Grid

    for cell in cells(load_recipe(RECIPE), preset):
        source = cell.settings.source
        assert isinstance(source, Multigrid)
        assert source.steps_per_epoch is not None
        inner: Any = source.source
        if source.long_cycle or source.short_cycle:
            schedule = source.schedule(Grid(getattr(inner, "frames", 0), inner.size), source.steps_per_epoch)
            assert cell.settings.train.steps == schedule.total, cell
        else:
            assert cell.settings.train.steps == round(source.epochs * source.steps_per_epoch), cell


def test_the_data_of_the_recipe(tmp_path: Path) -> None:
    settings = PackagedClips.model_validate(
        {"path": tmp_path / "c.jsonl", "cache": tmp_path, "frames": 4, "size": 16, "tiles": [1, 2], "kept_side": 24}
    )
    train, held = (settings.build(SourceContext(0, split, 4)) for split in ("train", "validation"))  # type: ignore[arg-type]
    assert len(train.classes) == 6
    assert train.fetch(0, range(4))["inputs"].std() > 0.3
    first, second = ({train.samples.stretches[r].start for r in s.rows_N if r < 20} for s in (train, held))  # type: ignore[attr-defined]
    assert max(first) < min(second), "held out are the last stretches of time"
