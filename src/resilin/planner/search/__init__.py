"""Choosing a layout: what can be run, what fits, what is quickest, and the settings that run it."""

from resilin.planner.search.find import Found, Objective, find
from resilin.planner.search.space import Fixed, arrangements
from resilin.planner.search.too_large import Missing, missing

__all__ = ["Fixed", "Found", "Missing", "Objective", "arrangements", "find", "missing"]
