"""What a step of a layout takes: operations, bytes in memory and on links, and the seconds they make. Pure."""

from resilin.planner.cost.arrangement import Arrangement, Workload
from resilin.planner.cost.memory import Memory, memory_of
from resilin.planner.cost.stack import RESILIN, STACKS, Stack
from resilin.planner.cost.step import Prediction, predict

__all__ = ["RESILIN", "STACKS", "Arrangement", "Memory", "Prediction", "Stack", "Workload", "memory_of", "predict"]
