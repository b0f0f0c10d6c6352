"""Choosing a layout by short real runs: proposals by a surrogate, failures counted, what mattered explained."""

from resilin.planner.tune.propose import by_chance, by_tpe, by_trees
from resilin.planner.tune.shapley import importance, shapley
from resilin.planner.tune.study import Rules, Study, tune
from resilin.planner.tune.trial import Outcome, Trial

__all__ = [
    "Outcome", "Rules", "Study", "Trial", "by_chance", "by_tpe", "by_trees", "importance", "shapley", "tune",
]  # fmt: skip
