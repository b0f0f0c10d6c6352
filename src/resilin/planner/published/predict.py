"""Predicting published runs: one share of peak for each machine and its software, from the row that is marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from resilin.config import UserError
from resilin.parallel.errors import ParallelError
from resilin.planner.cost import Prediction, Stack, predict
from resilin.planner.cost.stack import STACKS
from resilin.planner.hardware import Cluster, load_cluster
from resilin.planner.published.tables import PublishedRow, Table
from resilin.planner.search.find import usable

# Stacks that share a calibration are variants of one system on one machine.
_FAMILY = {
    "megatron-2021-unscattered": "megatron-2021",
    "torchtitan-compiled": "torchtitan",
    "torchtitan-async": "torchtitan",
}
_PLAIN_STATES = ("megatron-2021",)
"""Systems of which every replica updates all states."""
_LOW, _HIGH = 0.05, 1.0


@dataclass(frozen=True)
class Predicted:
    """A published run beside its prediction.

    Attributes:
        table: that it is in.
        row: of it.
        value: predicted, in the table's measure.
        step: the prediction.
        counted: whether it says anything: the row that calibrates does not.
    """

    table: Table
    row: PublishedRow
    value: float
    step: Prediction
    counted: bool

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.value / self.row.value - 1

    @property
    def memory_error(self) -> float | None:
        """The same of the memory, where it is published."""
        return self.step.memory.total / 2**30 / self.row.gib - 1 if self.row.gib else None


def measured_as(step: Prediction, measure: str) -> float:
    """A prediction in a table's measure."""
    return {
        "TFLOP/s": step.megatron_flops_per_device() / 1e12,
        "tokens/s": step.tokens_per_second / step.workers,
        "seconds": step.seconds,
        "sequences/s": step.tokens_per_second / step.work.tokens,
    }[measure]


def _layouts(row: PublishedRow, chosen: Sequence[str], cluster: Cluster) -> Iterator[PublishedRow]:
    """The run in every layout that its paper leaves open."""
    tensors = (4, 8) if "tensor" in chosen else (row.tensor,)
    stages = tuple(p for p in (1, 2, 4, 8, 12, 16, 32, 64, 128) if p <= row.layers) if "pipeline" in chosen else None
    micros = (1, 2, 4) if "micro" in chosen else (row.micro,)
    recomputes = ("none", "selective", "block") if "recompute" in chosen else (row.recompute,)
    for tensor, pipeline, micro, recompute in product(tensors, stages or (row.pipeline,), micros, recomputes):
        used = tensor * pipeline
        data = row.workers // used if row.workers else row.data
        if (row.workers and row.workers % used) or tensor > cluster.node or row.batch % max(data * micro, 1):
            continue
        layers = row.model.layers
        counts = [v for v in (1, 2, 3, 4, 6, 8) if layers % (pipeline * v) == 0] if "chunks" in chosen else [row.chunks]
        for chunks in counts if pipeline > 1 else [1]:
            yield row.model_copy(
                update={
                    "tensor": tensor,
                    "pipeline": pipeline,
                    "data": data,
                    "micro": micro,
                    "recompute": recompute,
                    "chunks": chunks,
                }
            )


def predict_row(table: Table, row: PublishedRow, cluster: Cluster) -> Prediction:
    """One run's prediction; where its layout was not published, the best that fits.

    Raises:
        UserError: no layout of it can be.
    """
    stack = STACKS[table.stack]
    if not table.chosen:
        return _of(table, row, cluster, stack)
    work, quick = row.work, []
    for one in _layouts(row, table.chosen, cluster):
        plan = one.arrangement(sequence=stack.regathers, states_divided=True)
        try:
            step = predict(work, plan, cluster, stack, exact=False)
        except ParallelError:
            continue
        if step.memory.total <= usable(cluster, stack):
            quick.append(step)
    if not quick:
        raise UserError(f"{table.name}, {row.name}: no layout fits")
    best = min(quick, key=lambda one: one.seconds)
    return predict(work, best.plan, cluster, stack)


def _of(table: Table, row: PublishedRow, cluster: Cluster, stack: Stack) -> Prediction:
    divided = _FAMILY.get(table.stack, table.stack) not in _PLAIN_STATES
    plan = row.arrangement(sequence=stack.regathers, states_divided=divided)
    return predict(row.work, plan, cluster, stack)


def with_products(cluster: Cluster, share: float) -> Cluster:
    """The machine with another share of its peak."""
    return cluster.model_copy(update={"efficiency": cluster.efficiency.model_copy(update={"products": share})})


def calibrated(table: Table, cluster: Cluster) -> float:
    """The share of peak with which the table's marked row comes out as published, to a thousandth."""
    row = next(one for one in table.runs() if one.name == table.calibrates)
    slower = table.measure == "seconds"
    low, high = _LOW, _HIGH
    for _ in range(12):
        middle = (low + high) / 2
        value = measured_as(predict_row(table, row, with_products(cluster, middle)), table.measure)
        if (value < row.value) is not slower:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def shares(tables: Sequence[Table]) -> dict[tuple[str, str], float]:
    """The share of peak of every machine and system of which a table has a marked row."""
    found = {}
    for table in tables:
        if table.calibrates:
            key = table.machine, _FAMILY.get(table.stack, table.stack)
            found[key] = calibrated(table, load_cluster(table.machine))
    return found


def predict_all(tables: Sequence[Table]) -> tuple[list[Predicted], dict[tuple[str, str], float]]:
    """Every row of the tables, and the shares of peak they were predicted with."""
    known, found = shares(tables), []
    for table in tables:
        share = known[table.machine, _FAMILY.get(table.stack, table.stack)]
        cluster = with_products(load_cluster(table.machine), share)
        for row in table.runs():
            step = predict_row(table, row, cluster)
            value = measured_as(step, table.measure)
            found.append(Predicted(table, row, value, step, row.name != table.calibrates))
    return found, known
