"""What the ranks of a pipeline do where each stage has one: a schedule, and evaluation along the line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resilin.parallel.pipeline.messages import Message, Op, Receive, Send
from resilin.parallel.pipeline.schedule import Action, F


class LineOrders:
    """The `Orders` of one rank.

    Args:
        ops_for: its operations for so many micro-batches: of `lower`.
        rank_of: for each stage the rank that holds it.
        rank: this one.
    """

    in_order = True

    def __init__(self, ops_for: Callable[[int], Sequence[Op]], rank_of: Sequence[int], rank: int) -> None:
        self.stages = len(rank_of)
        self._ops_for, self._rank_of = ops_for, rank_of
        self._mine = [stage for stage, holder in enumerate(rank_of) if holder == rank]
        self._known: dict[int, tuple[Op, ...]] = {}

    def training(self, step: int, micros: int) -> Sequence[Op]:
        """The same in every step."""
        if micros not in self._known:
            self._known[micros] = tuple(self._ops_for(micros))
        return self._known[micros]

    def evaluating(self, batches: int, total: int) -> Sequence[Op]:
        """One batch after another through this rank's stages."""
        ops: list[Op] = []
        for micro in range(batches):
            for stage in self._mine:
                if stage and stage - 1 not in self._mine:
                    ops.append(Receive(Message(stage - 1, stage, micro), self._rank_of[stage - 1]))
                ops.append(Action(F, stage, micro))
                if stage + 1 < len(self._rank_of) and stage + 1 not in self._mine:
                    ops.append(Send(Message(stage, stage + 1, micro), self._rank_of[stage + 1]))
        return ops
