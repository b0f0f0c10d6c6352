"""The dataflow axis: who computes which slots once members have gone or come (ElasWave, section 3).

The step stays what it was, slot by slot; so do the gradient's scale and every random number, which belong to slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from resilin.cluster.axes.pipeline import Pipeline
from resilin.parallel.pipeline import ScheduleError, SlotTable, in_blocks, in_turns

Assignment = Literal["whole", "runs", "reshape", "turns"]
"""whole: survivors keep their micro-batches, and each orphan moves whole to who has least.
runs: all micro-batches are dealt anew, in runs of neighbours, as the workers of a data-parallel run have them.
reshape: each orphan is cut into runs of slots, one for each survivor's micro-batch: no more micro-batches, larger ones.
turns: every tick's slots are shared by all replicas of every stage, so that all keep in step.
"""
ASSIGNMENTS: tuple[Assignment, ...] = get_args(Assignment)
EXACT: tuple[Assignment, ...] = ("whole", "runs")
"""Those that keep micro-batches whole, and with them the bits."""


def assign(now: Pipeline, members: Sequence[Sequence[int]], how: Assignment) -> tuple[SlotTable, ...]:
    """The stages' tables after a change.

    Args:
        now: before it.
        members: of each stage, after it.
        how: see `Assignment`.

    Raises:
        ScheduleError: there are too few micro-batches, or slots, for so many members.
    """
    if len(members) != len(now.tables):
        raise ScheduleError(f"members are given for {len(members)} stages; the pipeline has {len(now.tables)}")
    return tuple(_table(now, table, tuple(stage), how) for table, stage in zip(now.tables, members, strict=True))


def _table(now: Pipeline, table: SlotTable, members: tuple[int, ...], how: Assignment) -> SlotTable:
    if not members:
        raise ScheduleError("a stage has no member left: one of another stage has to move here first")
    if how == "turns":
        return in_turns(now.slots, len(members), now.ticks).named(members)
    gone = [one for one in table.replicas if one not in members]
    come = [one for one in members if one not in table.replicas]
    if how == "runs" or len(gone) == len(table.replicas):  # of the latter nobody has anything that he could keep
        return in_blocks(now.slots, len(members), now.micro).named(members)
    if gone:
        table = table.without(gone, "reshape" if how == "reshape" else "whole")
    for one in come:
        table = table.joined(one)
    return table
