"""What is planned when workers are lost or come: who computes what, where layers live, which clocks. Pure (ElasWave).

The paper's scheduler has four axes. Randomness needs no plan here: every number is keyed by its slot. The other three
are `dataflow`, `graph` and `clocks`; `decide` takes them in this order and says of each what it would cost and why.
"""

from resilin.cluster.axes.clocks import Clocks, StageTime, absorb
from resilin.cluster.axes.dataflow import ASSIGNMENTS, Assignment, assign
from resilin.cluster.axes.decide import Decision, Rules, decide
from resilin.cluster.axes.graph import Moves, Repartition, repartition
from resilin.cluster.axes.hook import ClocksHook, chosen_clocks, clocks_hook
from resilin.cluster.axes.layers import Layers, Machine, PlanError
from resilin.cluster.axes.pipeline import Pipeline
from resilin.cluster.axes.step import Step, step_of

__all__ = [
    "ASSIGNMENTS",
    "Assignment",
    "Clocks",
    "ClocksHook",
    "Decision",
    "Layers",
    "Machine",
    "Moves",
    "Pipeline",
    "PlanError",
    "Repartition",
    "Rules",
    "StageTime",
    "Step",
    "absorb",
    "assign",
    "chosen_clocks",
    "clocks_hook",
    "decide",
    "repartition",
    "step_of",
]
