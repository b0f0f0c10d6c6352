"""What the members of a pipeline do where each stage has as many as it happens to have, and any micro-batches each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resilin.parallel.pipeline.members import level, lower_members
from resilin.parallel.pipeline.messages import Message, Op, Part, Receive, Send
from resilin.parallel.pipeline.schedule import Action, F
from resilin.parallel.pipeline.simulate import Costs
from resilin.parallel.pipeline.slots import SlotTable

Owners = Sequence[Sequence[Sequence[int]]]
"""By stage and member ascending numbers of micro-batches; those of every stage are together the same."""


class MemberOrders:
    """The `Orders` of one member. Micro-batches move whole, so a message is one of them (ElasWave, section 1).

    Args:
        sizes: of every stage, in members.
        rank: this member's number, counted stage by stage.
        todo: the micro-batches of a step that are to be computed, by stage and member.
        evaluated: held-out batches, so many of them, likewise.
        costs: of a micro-batch at each stage, by which the order is found.
        tied: whether the first stage's gradients of the embedding's output go to the last stage.
    """

    in_order = False

    def __init__(
        self,
        sizes: Sequence[int],
        rank: int,
        todo: Callable[[int], Owners],
        evaluated: Callable[[int], Owners],
        costs: Costs,
        tied: bool = False,
    ) -> None:
        self.stages, self._tied = len(sizes), tied
        self._sizes, self._rank, self._todo, self._evaluated, self._costs = sizes, rank, todo, evaluated, costs
        self._known: tuple[Owners, Sequence[Op]] | None = None

    def training(self, step: int, micros: int) -> Sequence[Op]:
        """1F1B for whoever computes what in this step; see `level`."""
        owners = self._todo(step)
        if self._known is None or self._known[0] != owners:
            self._known = owners, orders_of(owners, self._costs, self._tied)[self._rank]
        return self._known[1]

    def evaluating(self, batches: int, total: int) -> Sequence[Op]:
        """One batch after another."""
        owners = self._evaluated(total)
        stage, replica = self._place()
        first = [sum(self._sizes[:s]) for s in range(len(self._sizes))]
        ops: list[Op] = []
        for micro, number in enumerate(owners[stage][replica]):
            for other in (stage - 1, stage + 1):
                if not 0 <= other < len(owners):
                    continue
                peer = next(place for place, mine in enumerate(owners[other]) if number in mine)
                theirs = owners[other][peer].index(number)
                if other < stage:
                    ops.append(Receive(Message(other, stage, theirs, received=micro), first[other] + peer))
                else:
                    ops.append(Send(Message(stage, other, micro, received=theirs), first[other] + peer))
            ops.insert(len(ops) - (stage + 1 < len(owners)), Action(F, stage, micro))
        return ops

    def _place(self) -> tuple[int, int]:
        left = self._rank
        for stage, size in enumerate(self._sizes):
            if left < size:
                return stage, left
            left -= size
        raise ValueError(f"there is no member {self._rank} among stages of {list(self._sizes)}")


def orders_of(owners: Owners, costs: Costs, tied: bool = False) -> list[list[Op]]:
    """Every member's operations, stage by stage.

    Args:
        owners: who computes what.
        costs: of a micro-batch at each stage.
        tied: see `lower_members`.

    Raises:
        ScheduleError: stages have different micro-batches.
    """
    numbers = sorted(number for mine in owners[0] for number in mine)
    at = {number: place for place, number in enumerate(numbers)}
    tables = [
        SlotTable.of(
            len(numbers),
            {replica: [[(at[number], at[number] + 1)] for number in mine] for replica, mine in enumerate(stage)},
        )
        for stage in owners
    ]
    return [[_whole(op) for op in row] for row in lower_members(level(tables, costs), tied=tied)]


def _whole(op: Op) -> Op:
    if isinstance(op, Action) or not isinstance(op.message, Part):
        return op
    part, rows = op.message, op.message.rows
    message = Message(part.source, part.target, rows.sender_micro, part.embedded, rows.receiver_micro)
    return type(op)(message, op.peer)
