"""Measuring a machine: products, memory, links between processes, disk; and a model's block beside them."""

from resilin.planner.calibrate.measure import calibrate

__all__ = ["calibrate"]
