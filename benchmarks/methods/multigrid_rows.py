"""Wall clock of multigrid training to the accuracy of plain training: real clips, same model, in turns.

Both contenders train in this process, a block of steps each in turn, so that a busy machine disturbs both alike; the
clock of each runs only while it trains (fetching included, evaluations left out).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilin.bench.results import Row
    from resilin.run.run import Run

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "multigrid"
POINT = 0.01
TARGET = 2.0


@dataclass
class Contender:
    """A run with its clock and its accuracies."""

    run: Run
    steps: int
    seconds: float = 0.0
    points: list[tuple[float, float]] = field(default_factory=list)
    """(seconds trained, held-out accuracy)."""

    def train(self, steps: int) -> None:
        """Some more steps."""
        began = time.perf_counter()
        for _ in range(min(steps, self.steps - self.run.step)):
            self.run._take_step()
        self.seconds += time.perf_counter() - began

    def evaluate(self) -> None:
        """Held-out accuracy, off the clock."""
        view = self.run._view()
        for part in self.run._parts():
            if hasattr(part, "before_evaluation"):
                part.before_evaluation(view)
        self.points.append((self.seconds, self.run.evaluate()["validation"]["top1"]))

    def seconds_to(self, accuracy: float) -> float | None:
        """Until the accuracy was reached for good; None: never."""
        found = None
        for seconds, reached in reversed(self.points):
            if reached < accuracy:
                break
            found = seconds
        return found


def contender(arm: str, seed: int, device: str, threads: int, shorter: int) -> Contender:
    """An arm of the recipe's preset `cpu`, as a run without a folder; `shorter`: divides its length, for a try."""
    from resilin.config.load import merge
    from resilin.recipes.cells import cells
    from resilin.recipes.recipe import load_recipe
    from resilin.run.build import build_run
    from resilin.run.settings import RunSettings

    cell = next(c for c in cells(load_recipe(RECIPE), "cpu", seeds=[seed]) if c.grid == "video" and c.arm == arm)
    # Evaluations are made by hand, so that they stay off the clock.
    patch: dict[str, Any] = {"train": {"device": device, "threads": threads}, "evaluation": {"every": 10**9}}
    tree = merge(cell.settings.model_dump(mode="json"), patch)
    settings = RunSettings.model_validate(tree)
    run = build_run(settings)
    run.pace = replace(run.pace, evaluate_every=0)
    return Contender(run, max(1, settings.train.steps // shorter))


def race(seed: int, device: str, threads: int, shorter: int, evaluations: int) -> dict[str, Contender]:
    """Both arms of a seed, in turns."""
    both = {arm: contender(arm, seed, device, threads, shorter) for arm in ("plain", "multigrid")}
    for turn in range(evaluations):
        for one in both.values():
            one.train(one.steps * (turn + 1) // evaluations - one.run.step)
        for one in both.values():
            one.evaluate()
    return both


def rows(options: argparse.Namespace, shorter: int = 1) -> Iterator[Row]:
    """The seconds that each needs to the plain run's final accuracy less a point; a round is a seed, three at most.

    `shorter` divides the length of both, to try it out.
    """
    from resilin.bench.results import Row

    ours: list[float] = []
    theirs: list[float] = []
    notes: list[str] = []
    missed = 0
    for seed in range(min(options.rounds, 3)):
        both = race(seed, options.device, options.threads, shorter, max(1, 20 // shorter))
        plain, multigrid = both["plain"], both["multigrid"]
        accuracy = plain.points[-1][1] - POINT
        reached = multigrid.seconds_to(accuracy)
        # A run that never gets there is not left out: it counts with its whole time, and the row as missed.
        missed += reached is None
        ours.append(multigrid.seconds if reached is None else reached)
        theirs.append(plain.seconds_to(accuracy) or plain.seconds)
        ends = f"{100 * multigrid.points[-1][1]:.1f} % against {100 * plain.points[-1][1]:.1f} %"
        notes.append(f"seed {seed} ends at {ends}" + ("" if reached is not None else ", below the goal"))
        print(f"multigrid seed {seed}: {ours[-1]:.1f} s against {theirs[-1]:.1f} s; {notes[-1]}", flush=True)
    yield Row.from_turns(
        "multigrid: training time to plain training's final accuracy less a point, clips of video",
        "s",
        ours,
        theirs,
        "plain training",
        better="lower",
        target=TARGET,
        failed=f"{missed} of {len(ours)} runs never reach that accuracy" if missed else "",
        note="; ".join(notes),
    )
