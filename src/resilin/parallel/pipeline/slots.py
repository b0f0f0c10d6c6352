"""Who computes which samples at one stage, and who sends what to whom when stages have unlike numbers of replicas."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from resilin.parallel.pipeline.errors import ScheduleError

Interval: TypeAlias = tuple[int, int]
"""Slots `start` up to, but not with, `end`."""
MicroSlots: TypeAlias = tuple[Interval, ...]
"""The slots of one micro-batch of a replica: its rows, in this order."""


@dataclass(frozen=True, slots=True)
class SlotTable:
    """The slots of a batch that each replica of one stage computes, micro-batch by micro-batch.

    A slot is a position in the global batch; every slot is owned once. Stages may have different tables. A table is a
    value: an edit gives a new one, equal tables are equal, and members can compare them.

    Attributes:
        slots: how many the batch has.
        owned: (replica, its micro-batches in the order it runs them), by replica.
    """

    slots: int
    owned: tuple[tuple[int, tuple[MicroSlots, ...]], ...]

    def __post_init__(self) -> None:
        replicas = [replica for replica, _ in self.owned]
        if replicas != sorted(set(replicas)):
            raise ScheduleError(f"replicas of a table must be listed once each and ascending, not {replicas}")
        for replica, micros in self.owned:
            if not all(micros):
                raise ScheduleError(f"replica {replica} has a micro-batch without slots")
        covered = 0
        for start, end, replica, micro in sorted(self._intervals()):
            where = f"replica {replica}, micro-batch {micro}"
            if start >= end or end > self.slots or start < 0:
                raise ScheduleError(f"{where}: {start}:{end} is no interval of the {self.slots} slots")
            if start < covered:
                raise ScheduleError(f"{where}: slot {start} is owned twice")
            if start > covered:
                raise ScheduleError(f"slots {covered}:{start} are owned by no replica")
            covered = end
        if covered < self.slots:
            raise ScheduleError(f"slots {covered}:{self.slots} are owned by no replica")

    @classmethod
    def of(cls, slots: int, owned: Mapping[int, Iterable[Iterable[Interval]]]) -> SlotTable:
        """From replica -> micro-batches -> intervals; what adjoins within a micro-batch is joined.

        Raises:
            ScheduleError: a slot that nobody owns, or two do; an interval that is none.
        """
        rows = ((replica, tuple(_joined(micro) for micro in micros)) for replica, micros in sorted(owned.items()))
        return cls(slots, tuple(rows))

    def _intervals(self) -> Iterable[tuple[int, int, int, int]]:
        for replica, micros in self.owned:
            for number, micro in enumerate(micros):
                for start, end in micro:
                    yield start, end, replica, number

    @property
    def replicas(self) -> tuple[int, ...]:
        """The live replicas, ascending."""
        return tuple(replica for replica, _ in self.owned)

    def micros(self, replica: int) -> tuple[MicroSlots, ...]:
        """A replica's micro-batches.

        Raises:
            ScheduleError: there is no such replica.
        """
        for one, micros in self.owned:
            if one == replica:
                return micros
        raise ScheduleError(f"there is no replica {replica}; there are {list(self.replicas)}")

    def load(self, replica: int) -> int:
        """How many slots a replica has."""
        return sum(end - start for micro in self.micros(replica) for start, end in micro)

    def named(self, numbers: Sequence[int]) -> SlotTable:
        """The same table of replicas with other numbers: `numbers` in place of the present ones, in ascending order.

        Raises:
            ScheduleError: more or fewer numbers than replicas, or one twice.
        """
        if len(numbers) != len(self.owned) or len(set(numbers)) != len(numbers):
            raise ScheduleError(f"{len(self.owned)} replicas cannot get the numbers {list(numbers)}")
        return SlotTable.of(self.slots, {new: micros for new, (_, micros) in zip(numbers, self.owned, strict=True)})

    def without(self, lost: int | Collection[int], how: Literal["whole", "reshape"] = "whole") -> SlotTable:
        """What is left after a loss: the others keep their own and share out what the lost replicas had.

        `whole`: its micro-batches move whole, the first slots first, each to whoever has the fewest slots (of equals
        to the smallest number), and everybody runs the lowest slots first. Shapes and the reduction's leaves stay what
        they were, so results are the same to the bit; some run one more micro-batch.

        `reshape`: each is cut into near-equal runs, one for each of the others, which join their micro-batch of the
        same position. Nobody runs more micro-batches, but larger ones, so results are equal to rounding only.

        Raises:
            ScheduleError: there is no such replica, or no other is left.
        """
        gone = {lost} if isinstance(lost, int) else set(lost)
        orphans = [(number, micro) for one in sorted(gone) for number, micro in enumerate(self.micros(one))]
        left = {replica: list(micros) for replica, micros in self.owned if replica not in gone}
        if not left:
            said = (
                f"replica {min(gone)} is the stage's last" if len(gone) == 1 else "all replicas of the stage are lost"
            )
            raise ScheduleError(f"{said}: nobody is left to take its slots")
        loads = {replica: self.load(replica) for replica in left}
        if how == "whole":
            for _, micro in sorted(orphans, key=lambda orphan: orphan[1]):
                heir = min(left, key=lambda replica: (loads[replica], replica))
                left[heir].append(micro)
                loads[heir] += _size(micro)
            return SlotTable.of(self.slots, {replica: sorted(micros) for replica, micros in left.items()})
        for number, micro in orphans:
            heirs = sorted(left, key=lambda replica: (loads[replica], replica))
            for heir, part in zip(heirs, _cut(micro, len(heirs)), strict=True):
                if not part:
                    continue
                mine = left[heir]
                if mine:
                    at = min(number, len(mine) - 1)
                    mine[at] = tuple(sorted((*mine[at], *part)))
                else:
                    mine.append(part)
                loads[heir] += _size(part)
        return SlotTable.of(self.slots, left)

    def joined(self, replica: int) -> SlotTable:
        """The table once a replica has come: it takes whole micro-batches from whoever has the most.

        One at a time, the last of the replica that runs the most (of equals the largest number) goes to the one that
        runs the fewest (of equals the smallest number), until no two differ by more than one. Stages that keep in step
        (`in_turns`) take a new table instead.

        Raises:
            ScheduleError: it is there already.
        """
        if replica in self.replicas:
            raise ScheduleError(f"replica {replica} is there already; there are {list(self.replicas)}")
        held = {one: list(micros) for one, micros in self.owned} | {replica: []}
        while True:
            most = max(held, key=lambda one: (len(held[one]), one))
            fewest = min(held, key=lambda one: (len(held[one]), one))
            if len(held[most]) - len(held[fewest]) <= 1:
                return SlotTable.of(self.slots, {one: sorted(micros) for one, micros in held.items()})
            held[fewest].append(held[most].pop())


def in_blocks(slots: int, replicas: int, micro: int) -> SlotTable:
    """Contiguous blocks: replica after replica has so many whole micro-batches, as evenly as they divide.

    Args:
        slots: of the batch.
        replicas: of the stage, numbered from 0; the first take what does not divide.
        micro: slots of a micro-batch; the last may have fewer.

    Raises:
        ScheduleError: fewer micro-batches than replicas.
    """
    count = -(-slots // max(micro, 1))
    if min(slots, replicas, micro) < 1 or count < replicas:
        raise ScheduleError(
            f"{slots} slots in micro-batches of {micro} are too few for {replicas} replicas: each needs one at least"
        )
    starts = [(micro * first, min(micro * (first + 1), slots)) for first in range(count)]
    owned = {}
    for replica in range(replicas):
        first, end = _share(count, replicas, replica)
        owned[replica] = [[interval] for interval in starts[first:end]]
    return SlotTable.of(slots, owned)


def in_turns(slots: int, replicas: int, micros: int) -> SlotTable:
    """Every micro-batch of the batch is shared by all replicas, so that stages of any number of them keep in step.

    Args:
        slots: of the batch.
        replicas: of the stage, numbered from 0.
        micros: micro-batches; as with replicas, the first take what does not divide.

    Raises:
        ScheduleError: a micro-batch has fewer slots than there are replicas.
    """
    if min(slots, replicas, micros) < 1 or slots // micros < replicas:
        raise ScheduleError(
            f"{slots} slots in {micros} micro-batches are too few for {replicas} replicas: each needs a slot of each"
        )
    owned: dict[int, list[list[Interval]]] = {replica: [] for replica in range(replicas)}
    for number in range(micros):
        first, end = _share(slots, micros, number)
        for replica in range(replicas):
            a, b = _share(end - first, replicas, replica)
            owned[replica].append([(first + a, first + b)])
    return SlotTable.of(slots, owned)


@dataclass(frozen=True, slots=True)
class Transfer:
    """Rows that one replica of a stage has and one of the next stage needs.

    Attributes:
        start: their first slot.
        end: one past the last.
        sender: the replica that has them.
        sender_micro: in which of its micro-batches.
        sender_row: at which row of that.
        receiver: the replica of the next stage.
        receiver_micro: in which of its micro-batches.
        receiver_row: at which row of that.
    """

    start: int
    end: int
    sender: int
    sender_micro: int
    sender_row: int
    receiver: int
    receiver_micro: int
    receiver_row: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.end - self.start


def transfers(source: SlotTable, target: SlotTable) -> tuple[Transfer, ...]:
    """What goes from each replica of one stage to those of its neighbour: the intersections of their slots.

    Activations go from the earlier stage's table to the later one's, gradients the same way back. Ascending by slot.
    Takes time in proportion to the intervals.

    Raises:
        ScheduleError: the tables are of batches of different sizes.
    """
    if source.slots != target.slots:
        raise ScheduleError(f"one stage has a table of {source.slots} slots, its neighbour of {target.slots}")
    ours, theirs = _rows(source), _rows(target)
    found = []
    a = b = 0
    while a < len(ours) and b < len(theirs):
        (start_a, end_a, sender, micro_a, row_a), (start_b, end_b, receiver, micro_b, row_b) = ours[a], theirs[b]
        start, end = max(start_a, start_b), min(end_a, end_b)
        rows = row_a + start - start_a, row_b + start - start_b
        found.append(Transfer(start, end, sender, micro_a, rows[0], receiver, micro_b, rows[1]))
        a, b = a + (end == end_a), b + (end == end_b)
    return tuple(found)


def _rows(table: SlotTable) -> list[tuple[int, int, int, int, int]]:
    """(start, end, replica, micro-batch, its first row there), ascending by slot."""
    found = []
    for replica, micros in table.owned:
        for number, micro in enumerate(micros):
            row = 0
            for start, end in micro:
                found.append((start, end, replica, number, row))
                row += end - start
    return sorted(found)


def _size(micro: MicroSlots) -> int:
    return sum(end - start for start, end in micro)


def _share(count: int, parts: int, part: int) -> Interval:
    """The part's share of `count` things in order, the first parts having one more where it does not divide."""
    each, more = divmod(count, parts)
    first = part * each + min(part, more)
    return first, first + each + (part < more)


def _cut(micro: MicroSlots, parts: int) -> list[MicroSlots]:
    """A micro-batch in near-equal runs of its rows; later ones are empty when it has too few."""
    size = _size(micro)
    found = []
    for part in range(parts):
        first, end = _share(size, parts, part)
        row, runs = 0, []
        for start, stop in micro:
            low, high = max(first - row, 0), min(end - row, stop - start)
            if low < high:
                runs.append((start + low, start + high))
            row += stop - start
        found.append(tuple(runs))
    return found


def _joined(micro: Iterable[Interval]) -> MicroSlots:
    runs: list[Interval] = []
    for start, end in micro:
        if runs and runs[-1][1] == start:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((start, end))
    return tuple(runs)


def slots_of(micro: MicroSlots) -> Sequence[int]:
    """The slots of a micro-batch, row by row."""
    return [slot for start, end in micro for slot in range(start, end)]
