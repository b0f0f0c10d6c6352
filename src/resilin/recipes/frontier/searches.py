"""Studies on the published machine: by trees, with more or less known beforehand, and by chance."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from resilin.planner.hardware import load_cluster
from resilin.planner.search.find import usable
from resilin.planner.tune import Rules, Study, by_chance, by_tpe, by_trees, tune
from resilin.planner.tune.features import Hint, hint_of
from resilin.planner.tune.sensitivity import sensitivity
from resilin.recipes.frontier.machine import MACHINE, Machine, best_rate, layouts, limit, rate

BUDGET, PARAMETERS = 60, 7
DRAWN = 2 * PARAMETERS + 1
KINDS = {
    "trees": "trees, with the cost model's memory",
    "blind": "trees, with nothing",
    "tpe": "TPE of optuna, with nothing",
    "chance": "chance",
    "hybrid": "trees on the cost model's errors, with its best first",
    "untrusted": "trees, on the same machine",
}
"""Ways to search, in words; the last two on a machine of which the cost model is wrong."""


@dataclass(frozen=True)
class Searched:
    """How one study went.

    Attributes:
        regret: after each trial, what is missing to the best rate, as a share.
        failed: of each trial, whether it failed.
        ranks: choices, the most influential first.
    """

    regret: tuple[float, ...]
    failed: tuple[bool, ...]
    ranks: tuple[str, ...]

    @property
    def last(self) -> float:
        """The regret at the end."""
        return self.regret[-1]

    def failing(self, third: int) -> float:
        """The share of a third of the trials that failed."""
        size = len(self.failed) // 3
        return fmean(self.failed[third * size : (third + 1) * size])


def _study(kind: str, seed: int, budget: int) -> Study:
    """Layouts in any order; the cost model's order for `hybrid` only."""
    wrong = kind in ("hybrid", "untrusted")
    machine, steps = Machine(seed, wrong), list(layouts())
    by_plan = {id(step.plan): step for step in steps}
    if kind == "hybrid":
        steps.sort(key=lambda step: (step.memory.total > limit(), step.seconds))
    else:
        random.Random(seed).shuffle(steps)
    hints = [hint_of(step, usable(load_cluster(MACHINE))) for step in steps]
    if kind in ("trees", "untrusted"):  # of times, nothing is known
        hints = [Hint(1.0, {"memory": hint.numbers["memory"]}) for hint in hints]
    elif kind != "hybrid":
        hints = []
    propose = {"tpe": by_tpe, "chance": by_chance}.get(kind, by_trees)
    rules = Rules(
        seed=seed,
        first=3 if kind == "hybrid" else 0,
        drawn=3 if kind == "hybrid" else DRAWN,
        propose=propose,
        most_failures=budget,
    )
    plans = [step.plan for step in steps]
    return tune(plans, lambda plan: machine.run(by_plan[id(plan)]), budget, rules, hints=hints)


@cache
def searched(kind: str, seed: int, budget: int = BUDGET) -> Searched:
    """One study of a kind.

    Args:
        kind: of `KINDS`.
        seed: of what is drawn and of the noise.
        budget: trials.
    """
    study, wrong = _study(kind, seed, budget), kind in ("hybrid", "untrusted")
    true = {id(step.plan): rate(step, wrong) for step in layouts()}
    regrets, observed, regret = [], -math.inf, 1.0
    for trial in study.trials:
        if trial.ran and trial.outcome.rate > observed:  # what a user would take: the best that was seen
            observed = trial.outcome.rate
            regret = 1 - true[id(study.plan_of(trial))] / best_rate(wrong)
        regrets.append(regret)
    ranks = tuple(sensitivity(study, seed)) if kind == "trees" else ()
    return Searched(tuple(regrets), tuple(not trial.ran for trial in study.trials), ranks)
