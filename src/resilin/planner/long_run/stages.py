"""Members of each stage share what the lost ones did: ReCycle, ElasWave's axes, and an elastic run of Resilin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from resilin.planner.long_run.pace import Pace, Paces
from resilin.planner.long_run.way import Slowness, Stop


@dataclass(frozen=True, slots=True)
class Habits:
    """In what ways that share work differ, beside how a step is planned.

    Attributes:
        seconds: for which all stand when somebody is lost.
        joining: for which all stand when somebody comes.
        redo: of the step under way.
        copies: of every machine's states in the next ones' memory; -1: every replica of a stage has all of them.
        moving: whether members change their stage where one has too few, as `resilin.cluster.changes` has them do.
        restart: seconds to begin again from a checkpoint, where states are lost.
        horizon: steps within which moving members has to have saved a step.
    """

    seconds: float
    joining: float
    redo: float = 0.0
    copies: int = 1
    moving: bool = False
    restart: float = 600.0
    horizon: int = 50


class Sharing:
    """The whole batch by whoever is there, stage by stage.

    Args:
        seats: of all machines; those of a stage are neighbours.
        stages: of the pipeline.
        members: replicas of a stage on one machine.
        paces: of a step.
        habits: of this way.

    Attributes:
        machines: (P,) of each stage.
    """

    def __init__(self, seats: int, stages: int, members: int, paces: Paces, habits: Habits) -> None:
        self._paces, self._habits, self._each, self._stages = paces, habits, members, stages
        width = seats // stages
        self._seats: list[dict[int, None]] = [
            dict.fromkeys(range(stage * width, (stage + 1) * width)) for stage in range(stages)
        ]
        self._stage_of = [seat // width for seat in range(seats)]
        self._taken = bytearray(b"\1") * seats
        self._empty: list[list[int]] = [[] for _ in range(stages)]
        self._empties = 0
        self._counts = [width] * stages
        self._slow = [Slowness() for _ in range(stages)]
        self._usually = (1.0,) * stages
        self._width, self._all = width, seats
        self._lost = False  # states of some layers: only a checkpoint has them
        usual = paces.of((width * members,) * stages, (1.0,) * stages)
        if usual is None:
            raise ValueError(
                "the members of an intact run cannot compute a step: it has too few micro-batches for them"
            )
        self._usual, self._pace = usual.seconds, usual
        self._levels = [paces.level(width * members)] * stages
        self.speed, self.heat = 1.0, usual.heat

    @property
    def machines(self) -> tuple[int, ...]:
        """(P,) machines of each stage."""
        return tuple(self._counts)

    def lose(self, seats: Sequence[int], noticed: float) -> Stop:
        """The others of their stages take over; of states without a copy, all begin again from a checkpoint."""
        lost = self._gone(seats) if not noticed else False
        for seat in seats:
            stage = self._stage_of[seat]
            del self._seats[stage][seat]
            self._counts[stage] -= 1
            self._taken[seat] = 0
            self._empty[stage].append(seat)
            self._slow[stage].set(seat, 1.0)
        self._empties += len(seats)
        self._lost = self._lost or lost or not (self._habits.moving or all(self._seats))
        if self._habits.moving:
            self._fill()
        moved = 0.0 if self._same(self._stage_of[seat] for seat in seats) else self._go()
        return self._stop(0.0 if noticed else self._habits.redo, moved)

    def replace(self, seats: Sequence[int], noticed: float) -> Stop:
        """Spare machines read the states of those that are gone from copies."""
        self._lost = self._lost or (not noticed and self._gone(seats))
        for seat in seats:
            self._slow[self._stage_of[seat]].set(seat, 1.0)
        return self._stop(0.0 if noticed else self._habits.redo, self._go())

    def come(self) -> tuple[int, Stop]:
        """To the stage that has the fewest, by whose machines it was left (or, where members move, by any)."""
        if not self._empties:
            raise ValueError("all seats are taken")
        counts = self._counts
        if self._habits.moving:
            stage = counts.index(min(counts))
            home = next(one for one in range(self._stages) if self._empty[one])
            seat = (self._empty[stage] or self._empty[home]).pop()
        else:
            stage = min((one for one in range(self._stages) if self._empty[one]), key=counts.__getitem__)
            seat = self._empty[stage].pop()
        self._empties -= 1
        self._stage_of[seat] = stage
        self._seats[stage][seat] = None
        self._counts[stage] += 1
        self._taken[seat] = 1
        if self._habits.moving:
            self._fill()
        stood = self.speed == 0
        moved = 0.0 if self._same((stage,)) else self._go()
        if stood and self.speed:
            return seat, self._stop(0.0, moved)
        return seat, Stop(self._habits.joining + moved)

    def slow(self, seat: int, factor: float) -> None:
        """Its stage takes longer."""
        self._slow[self._stage_of[seat]].set(seat, factor)
        self._go()

    def _same(self, stages: Iterable[int]) -> bool:
        """Whether the scheduler would say what it has said, as these stages' busiest members have as much to do."""
        if self._habits.moving and max(self._counts) - min(self._counts) > 1:
            return False
        if any(map(len, self._slow)):
            return False
        levels, counts, level, each = self._levels, self._counts, self._paces.level, self._each
        return all(level(counts[stage] * each) == levels[stage] for stage in stages)

    @property
    def _factors(self) -> tuple[float, ...]:
        return tuple(one.most for one in self._slow) if any(map(len, self._slow)) else self._usually

    def _stop(self, redo: float, moved: float) -> Stop:
        if self._lost and self.speed:
            self._lost = False
            return Stop(self._habits.restart, 0.0, True)
        return Stop(self._habits.seconds + moved, redo)

    def _gone(self, seats: Sequence[int]) -> bool:
        """Whether some states are in nobody's memory any more, when these machines are lost at one instant."""
        copies = self._habits.copies
        if copies < 0 or len(seats) <= copies:
            return False
        gone = set(seats)
        for seat in seats:
            holders = 0
            for at in self._ring(seat):
                if not self._taken[at]:
                    continue
                if at not in gone:
                    break  # a holder lives
                holders += 1
                if holders == copies:
                    return True
            else:
                return True
        return False

    def _ring(self, seat: int) -> Iterator[int]:
        """Who may hold a machine's states: the next of its stage, and then of the following ones (`View.holders`)."""
        stage, place = divmod(seat, self._width)
        for step in range(1, self._width):
            yield stage * self._width + (place + step) % self._width
        for step in range(self._width, self._all):
            yield (stage * self._width + step) % self._all

    def _fill(self) -> None:
        """A stage that nobody is left of gets one of the stage that has most (`resilin.cluster.changes.changed`)."""
        if all(self._counts):
            return
        for stage, mine in enumerate(self._seats):
            if not mine:
                most = max(range(self._stages), key=lambda one: len(self._seats[one]))
                if len(self._seats[most]) > 1:
                    self._shift(most, stage)

    def _shift(self, source: int, target: int) -> None:
        seat, _ = self._seats[source].popitem()
        factor = self._slow[source].of(seat)
        self._slow[source].set(seat, 1.0)
        self._seats[target][seat] = None
        self._counts[source] -= 1
        self._counts[target] += 1
        self._stage_of[seat] = target
        self._slow[target].set(seat, factor)

    def _even(self) -> float:
        """Members move until stages have near-equal numbers, where that is worth it; seconds that it takes.

        As `resilin.cluster.division.Division.better`: within the horizon it has to save more than a step.
        """
        counts = self._counts
        if max(counts) - min(counts) <= 1:
            return 0.0
        total = sum(counts)
        even = tuple(total // self._stages + (one < total % self._stages) for one in range(self._stages))
        better = self._ask(even)
        now = self._pace
        if better is None or (1 - better.seconds / now.seconds) * self._habits.horizon <= 1:
            return 0.0
        while len(most := max(self._seats, key=len)) - len(least := min(self._seats, key=len)) > 1:
            self._shift(self._seats.index(most), self._seats.index(least))
        return self._settle()

    def _ask(self, machines: tuple[int, ...]) -> Pace | None:
        return self._paces.of(tuple([count * self._each for count in machines]), self._factors)

    def _settle(self) -> float:
        found = self._ask(self.machines)
        if found is None:
            self.speed, self._levels = 0.0, [-1] * self._stages
            return 0.0
        members = tuple([count * self._each for count in self._counts])
        self._levels = [self._paces.level(count) for count in members]
        moved = self._paces.move(self._pace.split, found.split, members)
        self._pace, self.speed, self.heat = found, self._usual / found.seconds, found.heat
        return moved

    def _go(self) -> float:
        moved = self._settle()
        if self._habits.moving and self.speed and self._stages > 1:
            moved += self._even()
        return moved
