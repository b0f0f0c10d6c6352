"""A schedule with its messages: who sends what to whom, in an order that never locks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.schedule import Action, B, F, I, Schedule, W
from resilin.parallel.pipeline.simulate import Costs, PerStage, simulate
from resilin.parallel.pipeline.slots import Transfer
from resilin.parallel.pipeline.timeline import Time


class Carried(IntEnum):
    """What a message carries."""

    BACK = 0
    """The gradient of activations, to the stage that made them."""
    FORWARD = 1
    """Activations, to the next stage."""
    EMBEDDED = 2
    """The gradient of the embedding's output, from the first stage to the last, whose head has the same weight: there
    the two gradients of a micro-batch are added."""


@dataclass(frozen=True, slots=True)
class Message:
    """Activations on their way to the next stage, or their gradient on its way back.

    Attributes:
        source: the stage that made it.
        target: the stage that waits for it: one more, or one less; the last one, of what the first has `embedded`.
        micro: the micro-batch.
        embedded: whether it is for the sum of a weight that is tied; see `Carried`.
    """

    source: int
    target: int
    micro: int
    embedded: bool = False

    @property
    def carries(self) -> Carried:
        """What is in it."""
        return Carried.EMBEDDED if self.embedded else Carried(self.target > self.source)

    @property
    def forward(self) -> bool:
        """Whether it carries activations."""
        return self.carries is Carried.FORWARD

    @property
    def label(self) -> str:
        """What it carries, in few characters."""
        return str(self.micro)


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of a message that go from one replica to one other, where stages have replicas.

    Attributes:
        source: the stage that made them.
        target: the stage that waits for them.
        rows: which slots, and at which rows of whose micro-batch.
        embedded: as of a `Message`.
    """

    source: int
    target: int
    rows: Transfer
    embedded: bool = False

    @property
    def carries(self) -> Carried:
        """What is in it."""
        return Carried.EMBEDDED if self.embedded else Carried(self.target > self.source)

    @property
    def forward(self) -> bool:
        """Whether it carries activations."""
        return self.carries is Carried.FORWARD

    @property
    def label(self) -> str:
        """What it carries, in few characters."""
        return f"[{self.rows.start}:{self.rows.end}]"


@dataclass(frozen=True, slots=True)
class Send:
    """Hand a message to another rank; may go on as soon as nobody overwrites it.

    Attributes:
        message: what is sent.
        peer: the pipeline rank that gets it; with replicas, the member's number.
    """

    message: Message | Part
    peer: int

    def __str__(self) -> str:
        return f"{self.message.source}SEND_{self.message.carries.name[0]}{self.message.label}"


@dataclass(frozen=True, slots=True)
class Receive:
    """Get a message from another rank; must be there before the action that uses it.

    Attributes:
        message: what comes.
        peer: the pipeline rank that sends it; with replicas, the member's number.
    """

    message: Message | Part
    peer: int

    def __str__(self) -> str:
        return f"{self.message.target}RECV_{self.message.carries.name[0]}{self.message.label}"


Op: TypeAlias = Action | Send | Receive


def result_of(action: Action, stages: int) -> Message | None:
    """What an action has for a neighbouring stage; None for weight gradients and at the model's ends."""
    if action.kind is W:
        return None
    target = action.stage + 1 if action.kind is F else action.stage - 1
    return Message(action.stage, target, action.micro) if 0 <= target < stages else None


def embedded_of(action: Action, stages: int) -> Message | None:
    """What a backward of the first stage has for the last one, whose head has the embedding's weight."""
    if action.stage or action.kind not in (B, I):
        return None
    return Message(0, stages - 1, action.micro, embedded=True)


def lower(
    schedule: Schedule,
    costs: Costs | Callable[[Action], Time] = Costs(),
    transfer: PerStage = 0,
    *,
    tied: bool = False,
) -> tuple[tuple[Op, ...], ...]:
    """Each rank's actions with its sends and receives between them.

    All ranks' lists are cut from one common order in which a message is a single event. So the first event that is not
    yet over can always go on, even if each rank does its list strictly in turn, messages have no tags, and both sides
    block until they meet; also for two ranks, whose next and previous peer are one. The order is that of a
    simulation: a message goes as soon as it is made, and its receiver asks for it after what it has begun by then.
    Between stages on one rank there is no message.

    Args:
        schedule: any that does not deadlock.
        costs: for the simulation: real ones give the order of least waiting, any give the same results.
        transfer: likewise.
        tied: whether the first stage's gradients of the embedding's output go to the last stage.

    Raises:
        ScheduleError: as `simulate` does.
    """
    events: list[tuple[tuple[Time, bool, int, bool], Action | Message]] = []
    for position, record in enumerate(simulate(schedule, costs, transfer).records):
        # What is made at a time goes before what starts then; an action of no duration still comes before its message.
        events.append(((record.start, True, position, False), record.action))
        message = result_of(record.action, schedule.stages)
        if message is None and tied:
            message = embedded_of(record.action, schedule.stages)
        if message is not None:
            instant = record.end == record.start
            events.append(((record.end, instant, position, True), message))
    events.sort(key=lambda event: event[0])
    return tuple(map(tuple, _cut(schedule, [event for _, event in events])))


def _cut(schedule: Schedule, events: Sequence[Action | Message]) -> list[list[Op]]:
    rows: list[list[Op]] = [[] for _ in range(schedule.ranks)]
    for event in events:
        if isinstance(event, Action):
            rows[schedule.rank_of[event.stage]].append(event)
            continue
        sender, receiver = schedule.rank_of[event.source], schedule.rank_of[event.target]
        if sender != receiver:
            rows[sender].append(Send(event, receiver))
            rows[receiver].append(Receive(event, sender))
    return rows


def check_rendezvous(rows: Sequence[Sequence[Op]]) -> int:
    """Runs lists of operations as strictly as can be, and refuses those that would lock or mix messages up.

    Every rank does its list in turn; a send waits until its peer receives from just this rank, and the reverse;
    messages have no tags, so what arrives must be what is expected.

    Args:
        rows: each rank's operations.

    Returns:
        How many messages were exchanged.

    Raises:
        ScheduleError: the ranks that wait for each other and for what; or the message that arrives for another.
    """
    at = [0] * len(rows)
    exchanged = 0
    todo = list(range(len(rows)))
    while todo:
        rank = todo.pop()
        while at[rank] < len(rows[rank]):
            op = rows[rank][at[rank]]
            if isinstance(op, Action):
                at[rank] += 1
                continue
            other = rows[op.peer][at[op.peer]] if at[op.peer] < len(rows[op.peer]) else None
            if other is None or isinstance(other, Action) or type(other) is type(op) or other.peer != rank:
                break
            if other.message != op.message:
                raise ScheduleError(f"rank {rank} does {op} while rank {op.peer} does {other}: the message is mixed up")
            at[rank] += 1
            at[op.peer] += 1
            exchanged += 1
            todo.append(op.peer)
    stuck = [rank for rank in range(len(rows)) if at[rank] < len(rows[rank])]
    if stuck:
        waits = "; ".join(
            f"rank {rank} is at {op} with rank {op.peer}"
            for rank in stuck
            if not isinstance(op := rows[rank][at[rank]], Action)
        )
        raise ScheduleError(f"the order of messages locks: {waits}")
    return exchanged
