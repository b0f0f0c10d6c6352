"""When each action of a batch ran: simulated, or measured on a real run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.schedule import Action

Time = float | Fraction
"""In any unit; integers and fractions stay exact."""
_HEAD = "rank,action,start,end"


@dataclass(frozen=True, slots=True)
class Record:
    """One action as it ran.

    Attributes:
        action: what was computed.
        rank: of the pipeline.
        start: when it began, in the unit of the timeline.
        end: when it was done.
    """

    action: Action
    rank: int
    start: Time
    end: Time


@dataclass(frozen=True, slots=True)
class Timeline:
    """The records of one batch, and what they say of it.

    Attributes:
        records: each rank's in the order they ran.
        ranks: how many there are.
    """

    records: tuple[Record, ...]
    ranks: int

    @classmethod
    def of(cls, records: Iterable[Record], ranks: int | None = None) -> Timeline:
        """A timeline from records in any order, such as those that the ranks of a run measured.

        Raises:
            ScheduleError: there are none; one ends before it starts; or a rank has two at one time.
        """
        ordered = tuple(sorted(records, key=lambda record: (record.start, record.end, record.rank)))
        if not ordered:
            raise ScheduleError("a timeline needs records; there are none")
        last: dict[int, Record] = {}
        for record in ordered:
            if record.end < record.start:
                raise ScheduleError(f"rank {record.rank}: {record.action} ends at {record.end}, before {record.start}")
            before = last.get(record.rank)
            if before is not None and record.start < before.end:
                raise ScheduleError(
                    f"rank {record.rank}: {record.action} starts at {record.start}, while {before.action} runs "
                    f"until {before.end}; a rank computes one thing at a time"
                )
            last[record.rank] = record
        return cls(ordered, ranks if ranks is not None else 1 + max(last))

    @classmethod
    def parse(cls, text: str) -> Timeline:
        """From `text()`.

        Raises:
            ScheduleError: naming the line that is no record, or as `of` does.
        """
        records = []
        for number, line in enumerate(filter(str.strip, text.splitlines())):
            cells = [cell.strip() for cell in line.split(",")]
            if number == 0 and cells == _HEAD.split(","):
                continue
            try:
                rank, action, start, end = cells
                records.append(Record(Action.parse(action), int(rank), _time(start), _time(end)))
            except (ValueError, ZeroDivisionError) as error:
                raise ScheduleError(f"line {number + 1}: {line!r} is no {_HEAD}: {error}") from None
        return cls.of(records)

    def text(self) -> str:
        """A CSV file with a line for each record; fractions stay exact (`7/2`)."""
        return "\n".join([_HEAD, *(f"{r.rank},{r.action},{r.start},{r.end}" for r in self.records)]) + "\n"

    @property
    def start(self) -> Time:
        """When the first action began."""
        return min(record.start for record in self.records)

    @property
    def makespan(self) -> Time:
        """From the first start to the last end."""
        return max(record.end for record in self.records) - self.start

    def busy(self) -> tuple[Time, ...]:
        """How long each rank computed."""
        busy: list[Time] = [0] * self.ranks
        for record in self.records:
            busy[record.rank] += record.end - record.start
        return tuple(busy)

    def idle(self) -> tuple[Time, ...]:
        """How long each rank did not compute while the batch lasted: its bubble as a time."""
        makespan = self.makespan
        return tuple(makespan - busy for busy in self.busy())

    def gaps(self) -> tuple[Time, ...]:
        """How long each rank waited between its own first action and its last.

        What is left of the bubble when a rank may begin its next batch at once, as zero-bubble schedules with their
        optimizer step checked afterwards do.
        """
        first: dict[int, Time] = {}
        last: dict[int, Time] = {}
        for record in self.records:
            first.setdefault(record.rank, record.start)
            last[record.rank] = record.end
        return tuple(last[rank] - first[rank] - busy if rank in first else 0 for rank, busy in enumerate(self.busy()))

    @property
    def bubble(self) -> Time:
        """Idle time over computing time, summed over ranks: the papers' fraction of the ideal time.

        A `Fraction` when times are whole numbers or fractions. Not to be mixed up with the fraction of the total
        time, `bubble / (1 + bubble)`.
        """
        busy = sum(self.busy())
        idle = self.ranks * self.makespan - busy
        if busy == 0:
            return 0
        if isinstance(busy, int | Fraction) and isinstance(idle, int | Fraction):
            return Fraction(idle, busy)
        return idle / busy


def _time(text: str) -> Time:
    exact = text.lstrip("-").replace("/", "", 1).isdigit()
    return Fraction(text) if exact else float(text)
