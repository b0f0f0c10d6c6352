"""Train once, cut to any size: budgets that select a part of a model, run it in place, and take it out."""

from resilin.nested.budgets import Budget, BudgetError
from resilin.nested.cost import Cost, Latency, cost, latency
from resilin.nested.extract import extract, extract_folder
from resilin.nested.in_place import budget, full, is_cut
from resilin.nested.regions import regions
from resilin.nested.sub_model import sub_model, sub_settings

__all__ = [
    "Budget",
    "BudgetError",
    "Cost",
    "Latency",
    "budget",
    "cost",
    "extract",
    "extract_folder",
    "full",
    "is_cut",
    "latency",
    "regions",
    "sub_model",
    "sub_settings",
]
