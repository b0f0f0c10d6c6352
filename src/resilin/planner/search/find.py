"""The best layouts: all are estimated by closed forms, what does not fit is left out, the best are replayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from resilin.parallel.errors import ParallelError
from resilin.planner.cost import RESILIN, Memory, Prediction, Stack, Workload, memory_of, predict
from resilin.planner.cost.memory import host_bytes
from resilin.planner.hardware import Cluster
from resilin.planner.search.space import Fixed, arrangements

Objective = Literal["time", "cost", "energy"]
REPLAYED = 24
"""How many of the best by closed form have their schedules replayed."""

CLOSED_FORMS = 1.15
"""What is so far above the limit by closed forms, which know no moment at which all is held, is not replayed."""


@dataclass(frozen=True)
class Choice:
    """One layout that fits, for a whole run.

    Attributes:
        step: its prediction.
        seconds: of the run.
        cost: of the run; None where the cluster's file has no price.
        joules: of the run; None where it has no power.
    """

    step: Prediction
    seconds: float
    cost: float | None
    joules: float | None

    def key(self, objective: Objective) -> tuple[float, float]:
        """What it is ranked by: less is better; then by memory."""
        value = {"time": self.seconds, "cost": self.cost, "energy": self.joules}[objective]
        return (self.step.workers * self.seconds if value is None else value), self.step.memory.total


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        best: ranked.
        pareto: those that no other one beats in time, workers and memory at once, by time.
        tried: how many layouts were priced.
        too_large: how many of them do not fit.
        smallest: the least memory that any of them needs, and its layout's name.
    """

    best: tuple[Choice, ...]
    pareto: tuple[Choice, ...]
    tried: int
    too_large: int
    smallest: tuple[Memory, str] | None


def usable(cluster: Cluster, stack: Stack = RESILIN) -> float:
    """Bytes of a device's memory that a plan may count on."""
    return cluster.device.memory * (1 - stack.headroom)


def find(
    work: Workload,
    cluster: Cluster,
    counts: Sequence[int],
    tokens: float,
    fixed: Fixed = Fixed(),
    objective: Objective = "time",
    stack: Stack = RESILIN,
    device_type: str = "cuda",
    cores: int | None = None,
) -> Found:
    """The best layouts for numbers of workers.

    Args:
        work: model and steps.
        cluster: on what.
        counts: numbers of workers that may be used.
        tokens: of the whole run.
        fixed: what is not to be chosen.
        objective: what to rank by.
        stack: the training system.
        device_type: see `predict`.
        cores: see `predict`.
    """
    limit, host = usable(cluster, stack), cluster.host.memory if cluster.host else float("inf")
    estimated: list[tuple[tuple[float, float], Prediction]] = []
    tried, refused = 0, Counter[str]()
    smallest: tuple[Memory, str] | None = None
    for workers in counts:
        for plan in arrangements(work, cluster, workers, fixed):
            try:
                memory = memory_of(work, plan, stack, device_type, exact=False)
                tried += 1
                if smallest is None or memory.total < smallest[0].total:
                    smallest = memory, str(plan)
                if host_bytes(work, plan) > host:
                    refused["host"] += 1
                    continue
                if memory.total > limit * CLOSED_FORMS:
                    refused[memory.largest] += 1
                    continue
                step = predict(
                    work, plan, cluster, stack, device_type=device_type, cores=cores, exact=False, memory=memory
                )
            except ParallelError:
                continue
            estimated.append((_choice(step, cluster, tokens).key(objective), step))
    estimated.sort(key=lambda pair: pair[0])
    best = []
    for _, step in estimated:
        exact = predict(work, step.plan, cluster, stack, device_type=device_type, cores=cores)
        if exact.memory.total > limit:
            refused[exact.memory.largest] += 1
            continue
        best.append(_choice(exact, cluster, tokens))
        if len(best) == REPLAYED:
            break
    best.sort(key=lambda one: one.key(objective))
    # The rest of the Pareto set comes from closed forms, and is replayed as well.
    seen = {id(one.step.plan) for one in best}
    rest = pareto([_choice(step, cluster, tokens) for _, step in estimated if id(step.plan) not in seen])
    exact_rest = [
        predict(work, one.step.plan, cluster, stack, device_type=device_type, cores=cores) for one in rest[:REPLAYED]
    ]
    others = [_choice(step, cluster, tokens) for step in exact_rest if step.memory.total <= limit]
    every = sorted([*best, *others], key=lambda one: one.key(objective))
    return Found(tuple(every[: len(best)]), pareto(every), tried, sum(refused.values()), smallest)


def _choice(step: Prediction, cluster: Cluster, tokens: float) -> Choice:
    seconds = tokens / step.tokens_per_second
    busy = min(step.busiest.total / step.seconds, 1.0)
    return Choice(step, seconds, cluster.cost(step.workers, seconds), cluster.energy(step.workers, seconds, busy))


def pareto(found: Sequence[Choice]) -> tuple[Choice, ...]:
    """Those that no other one beats in seconds, workers and memory at once, the quickest first."""
    # Of equals in time, those with less of the rest come first.
    pool = sorted(found, key=lambda one: (one.seconds, one.step.workers, one.step.memory.total))
    kept: list[Choice] = []
    for one in pool:
        workers, memory = one.step.workers, one.step.memory.total
        if not any(other.step.workers <= workers and other.step.memory.total <= memory for other in kept):
            kept.append(one)
    return tuple(kept)
