"""A published machine to try layouts on, as the cost model has it: Frontier, 175 billion parameters on 128 dies.

What the cost model does not know of it is drawn, keyed by the layout: how much more or less memory it needs (fragments,
buffers), 2% of noise of every trial, and, for the study of a cost model that is wrong, factors of single choices.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from itertools import product

from resilin.parallel.errors import ParallelError
from resilin.parallel.settings import ParallelSettings
from resilin.planner.cost import STACKS, Arrangement, Prediction, Workload, predict
from resilin.planner.cost.arrangement import Recompute
from resilin.planner.hardware import load_cluster
from resilin.planner.search.find import usable
from resilin.planner.search.shapes import load_shape
from resilin.planner.tune.features import choices
from resilin.planner.tune.trial import Outcome

MACHINE, STACK = "frontier", "megatron-deepspeed"
WORKERS, ROWS = 128, 1024
LEAST_PARTS = 16
"""Of the model: fewer hold its states nowhere."""
NOISE, MEMORY_NOISE, CHOICE_NOISE = 0.02, 0.08, 0.15
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "block")


@cache
def workload() -> Workload:
    """The model and its steps: as many tokens in every layout."""
    shape = load_shape("gpt-175b")
    return Workload(shape.model, shape.tokens, ROWS)


@cache
def layouts() -> tuple[Prediction, ...]:
    """Every layout that may be tried, priced by closed forms; most do not fit."""
    cluster, work, found = load_cluster(MACHINE), workload(), []
    degrees = product((1, 2, 4, 8), (4, 8, 16, 32), (1, 2, 3, 6), (1, 2, 4, 8))
    for tensor, pipeline, chunks, micro in degrees:
        parts, stages = tensor * pipeline, pipeline * chunks
        data = WORKERS // parts
        if WORKERS % parts or parts < LEAST_PARTS or work.model.layers % stages or ROWS % (data * micro):
            continue
        if chunks > 1 and ROWS // (data * micro) % pipeline:
            continue
        for divided, sequence, recompute in product((True, False), (True, False), RECOMPUTES):
            if sequence and tensor == 1:
                continue
            parallel = ParallelSettings(
                data=data,
                tensor=tensor,
                pipeline=pipeline,
                chunks=chunks,
                schedule="interleaved" if chunks > 1 else "1f1b",
                layers=(work.model.layers // stages,) * stages,
                sequence=sequence,
            )
            plan = Arrangement(parallel, micro, recompute, "fp16", states_divided=divided)
            try:
                found.append(predict(work, plan, cluster, STACKS[STACK], exact=False))
            except ParallelError:
                continue
    return tuple(found)


def limit() -> float:
    """Bytes of a die that a layout may fill."""
    return usable(load_cluster(MACHINE), STACKS[STACK])


def _key(plan: Arrangement) -> str:
    return " ".join(map(str, choices(plan).values()))


def needed(step: Prediction) -> float:
    """Bytes that a layout turns out to need."""
    return step.memory.total * math.exp(random.Random(_key(step.plan)).gauss(0, MEMORY_NOISE))


def rate(step: Prediction, wrong: bool = False) -> float:
    """Tokens a second that a layout turns out to have, without noise.

    Args:
        step: its prediction.
        wrong: whether the cost model is wrong about single choices, by 15% or so each.
    """
    found = step.tokens_per_second
    if wrong:
        chosen = choices(step.plan)
        for name in ("tensor", "micro", "recompute", "schedule"):
            found *= math.exp(random.Random(f"{name} {chosen[name]}").gauss(0, CHOICE_NOISE))
    return found


@dataclass(frozen=True)
class Machine:
    """Trials on it.

    Attributes:
        seed: of the noise.
        wrong: see `rate`.
    """

    seed: int
    wrong: bool = False

    def run(self, step: Prediction) -> Outcome:
        """One trial."""
        if needed(step) > limit():
            return Outcome("oom", reason=f"{needed(step) / 1e9:.3g} GB of {limit() / 1e9:.3g}")
        noise = random.Random(f"{self.seed} {_key(step.plan)}").gauss(1.0, NOISE)
        return Outcome("ok", rate(step, self.wrong) * noise)


@cache
def best_rate(wrong: bool = False) -> float:
    """Of what fits."""
    return max(rate(step, wrong) for step in layouts() if needed(step) <= limit())
