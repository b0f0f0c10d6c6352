"""Choosing a layout by short real runs: proposals by a surrogate, failures counted, what mattered explained."""

from resilin.planner.tune.shapley import importance, shapley
from resilin.planner.tune.study import Study, Trial, tune

__all__ = ["Study", "Trial", "importance", "shapley", "tune"]
