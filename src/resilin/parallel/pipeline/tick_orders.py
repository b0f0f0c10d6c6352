"""What the members of a pipeline do where all of a stage compute at the same time, however many each stage has.

A step is cut into ticks, and every stage's members share each of them: so stages with unlike numbers of members keep in
step, and those of one stage do the same, one action after the other. That is what they have to do where they exchange
something on the way, such as tokens for the experts that they have between them (ElasWave, section 4: turns).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resilin.parallel.micro_batches import shared_batches
from resilin.parallel.pipeline.generate import one_f_one_b
from resilin.parallel.pipeline.member_orders import MemberOrders, Owners
from resilin.parallel.pipeline.messages import Message, Op, Part, Receive, Send, lower
from resilin.parallel.pipeline.schedule import Action, F
from resilin.parallel.pipeline.simulate import Costs
from resilin.parallel.pipeline.slots import Transfer


@dataclass(frozen=True, slots=True)
class _Line:
    """All members at one tick: whose rows go to whom.

    Attributes:
        shares: by stage and replica the slots.
        first: by stage the number of its first member.
    """

    shares: Sequence[Sequence[range]]
    first: Sequence[int]

    def parts(self, message: Message, replica: int, *, sends: bool) -> list[Op]:
        """A message of a whole tick as what one replica sends, or receives, of it; ascending by slot."""
        stage, other = (message.source, message.target) if sends else (message.target, message.source)
        mine = self.shares[stage][replica]
        found: list[Op] = []
        for peer, theirs in enumerate(self.shares[other]):
            start, end = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
            if start >= end:
                continue
            here, there = (replica, start - mine.start), (peer, start - theirs.start)
            (sender, sender_row), (receiver, receiver_row) = (here, there) if sends else (there, here)
            tick = message.micro
            rows = Transfer(start, end, sender, tick, sender_row, receiver, tick, receiver_row)
            part = Part(message.source, message.target, rows)
            found.append((Send if sends else Receive)(part, self.first[other] + peer))
        return found


class TickOrders:
    """The `Orders` of one member.

    Args:
        sizes: of every stage, in members.
        rank: this member's number, counted stage by stage.
        slots: of a step.
        micro: the most slots that a member computes at once.
        evaluated: held-out batches, so many of them, by stage and member.
        costs: of a tick at each stage, by which the order of messages is found.
    """

    in_order = True

    def __init__(
        self,
        sizes: Sequence[int],
        rank: int,
        slots: Callable[[int], int],
        micro: int,
        evaluated: Callable[[int], Owners],
        costs: Costs,
    ) -> None:
        self.stages = len(sizes)
        self._sizes, self._slots, self._micro, self._costs = tuple(sizes), slots, micro, costs
        self._first = [sum(sizes[:stage]) for stage in range(len(sizes))]
        self._stage = next(stage for stage in reversed(range(len(sizes))) if self._first[stage] <= rank)
        self._replica = rank - self._first[self._stage]
        self._evaluated, self._whole = evaluated, MemberOrders(sizes, rank, lambda _: (), evaluated, costs)
        self._known: dict[int, Sequence[Op]] = {}

    def training(self, step: int, micros: int) -> Sequence[Op]:
        """1F1B over ticks: of all of a stage's members the same."""
        if (count := self._slots(step)) not in self._known:
            self._known[count] = self._ops(count)
        return self._known[count]

    def _ops(self, count: int) -> list[Op]:
        cut = shared_batches(count, self._micro, self._sizes)
        ticks = len(cut[0]) // self._sizes[0]
        lines = [_Line([micros[tick::ticks] for micros in cut], self._first) for tick in range(ticks)]
        ops: list[Op] = []
        for op in lower(one_f_one_b(self.stages, self.stages, ticks), self._costs)[self._stage]:
            if isinstance(op, Action):
                ops.append(op)
            else:
                assert isinstance(op.message, Message)
                sends = isinstance(op, Send)
                ops += lines[op.message.micro].parts(op.message, self._replica, sends=sends)
        return ops

    def evaluating(self, batches: int, total: int) -> Sequence[Op]:
        """One batch after another; at last those that stand in, as others of the stage have more."""
        mine = len(self._evaluated(total)[self._stage][self._replica])
        idle = [Action(F, self._stage, micro) for micro in range(mine, batches)]
        return [*self._whole.evaluating(mine, total), *idle]
