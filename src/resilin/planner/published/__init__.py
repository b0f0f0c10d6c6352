"""Published runs, predicted from their machines' constants with one calibration for each machine and its software."""

from resilin.planner.published.predict import Predicted, predict_all
from resilin.planner.published.tables import PublishedRow, Table, load_tables

__all__ = ["Predicted", "PublishedRow", "Table", "load_tables", "predict_all"]
