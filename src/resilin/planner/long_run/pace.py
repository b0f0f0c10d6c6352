"""How long a step takes with the members that there are: asked of the scheduler that an elastic run itself has.

`resilin.cluster.axes.decide` replays the pipeline's own orders. Where all members' passes are few enough it is asked
about all of them. Where they are more, it is asked about a slice of two of every stage (more after heavy losses) in
which the busiest has as much to do as the busiest of all (`resilin bench run simulator` tells how near that comes);
what is slow does as if it had more to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Protocol

from resilin.cluster.axes import Assignment, Decision, Layers, Machine, Pipeline, PlanError, Rules, decide
from resilin.cluster.axes.graph import moves
from resilin.cluster.axes.step import step_of
from resilin.parallel.pipeline import SlotTable, Split, balanced

CUT: tuple[Assignment, ...] = ("reshape", "turns")
MOST_PASSES = 512  # of all members in a step, that are replayed in some tenths of a second; more are sliced
FINEST = 256  # slots of a member in a slice: loads are rounded up to this share
SLOWEST = 64  # parts in which factors of slow members are told apart


@dataclass(frozen=True, slots=True)
class Pace:
    """A step of some members.

    Attributes:
        seconds: that it takes.
        split: which layers each stage then has; None: the model is not divided.
        heat: energy of its work over that of the same work at the usual clocks; a clock's power is taken to go with its
            cube, so the energy of a piece of work with its square.
    """

    seconds: float
    split: Split | None = None
    heat: float = 1.0


class Paces(Protocol):
    """Seconds of a step, asked for many times."""

    def of(self, members: tuple[int, ...], slow: tuple[float, ...]) -> Pace | None:
        """With so many members of each stage, the slowest of each by such factors; None: they cannot compute a step."""

    def level(self, members: int) -> int:
        """A number for what `of` knows of the members of one stage: where it is equal for all stages, so is the
        answer.
        """

    def move(self, before: Split | None, after: Split | None, members: tuple[int, ...]) -> float:
        """Seconds that it takes until layers are where they are to be."""


@dataclass(frozen=True)
class Job:
    """What is trained, as the scheduler sees it.

    Attributes:
        layers: what each costs, in seconds.
        stages: of the pipeline.
        replicas: of each stage, when none is missing.
        ticks: micro-batches of each in a step.
        micro: slots of a micro-batch.
        machine: memory, links and clocks.
        horizon: steps within which a move of layers has to be worth its time.
    """

    layers: Layers
    stages: int
    replicas: int
    ticks: int
    micro: int = 1
    machine: Machine = field(default_factory=Machine)
    horizon: int = 50

    @cached_property
    def split(self) -> Split:
        """The best one while nobody is missing."""
        return balanced(
            self.layers.seconds,
            self.stages,
            self.layers.embedding,
            self.layers.head,
            [1] * self.stages,
            lambda _, first, end: end > first,
        )

    @property
    def micros(self) -> int:
        """Of a step."""
        return self.replicas * self.ticks

    @cached_property
    def intact(self) -> float:
        """Seconds of a step when nobody is missing.

        Raises:
            PlanError: it does not fit into memory.
        """
        step = step_of(_slice(self, (Fraction(1),) * self.stages, False, False), self.layers, self.machine)
        if step is None:
            raise PlanError("a step does not fit into the machines' memory even when nobody is missing")
        return float(step.seconds)

    def taking(self, seconds: float) -> Job:
        """The same with all layers' costs multiplied so that an intact step takes so long."""
        factor = seconds / self.intact
        layers = replace(
            self.layers,
            seconds=tuple(float(cost) * factor for cost in self.layers.seconds),
            embedding=float(self.layers.embedding) * factor,
            head=float(self.layers.head) * factor,
        )
        return replace(
            self, layers=layers, machine=replace(self.machine, transfer=float(self.machine.transfer) * factor)
        )


class ScheduledPaces:
    """What `decide` says, remembered.

    Args:
        job: what is trained.
        assignments: ways to deal slots that may be taken.
        graph: whether layers may move.
        clocks: whether clocks may be set.
    """

    def __init__(self, job: Job, assignments: tuple[Assignment, ...], graph: bool = True, clocks: bool = True) -> None:
        self.job = job
        self._rules = Rules(assignments=assignments, graph=graph, horizon=job.horizon)
        self._machine = job.machine if clocks else replace(job.machine, clocks=None)
        self._whole = any(how not in CUT for how in assignments)
        self._cut = any(how in CUT for how in assignments)
        self._alone = replace(job, replicas=1, machine=self._machine)
        self._known: dict[tuple[object, ...], Pace | None] = {}
        self._levels: dict[int, int] = {}
        self._loads: dict[object, int] = {}

    def of(self, members: tuple[int, ...], slow: tuple[float, ...]) -> Pace | None:
        """See `Paces`."""
        parts = () if max(slow) == 1.0 else tuple(_parts(factor) for factor in slow)
        key = (*map(self.level, members), *parts)
        if key not in self._known:
            self._known[key] = self._ask(members, slow)
        return self._known[key]

    def level(self, members: int) -> int:
        """See `Paces`: the number itself where all are replayed, else what the busiest has to do."""
        known = self._levels.get(members)
        if known is None:
            load = self._load(members)
            known = self._levels[members] = self._loads.setdefault(load, len(self._loads))
        return known

    def move(self, before: Split | None, after: Split | None, members: tuple[int, ...]) -> float:
        """See `Paces`."""
        if before is None or after is None or before == after:
            return 0.0
        return moves(before, after, self.job.layers, self._machine, members).seconds

    @property
    def asked(self) -> int:
        """How many different states there were."""
        return len(self._known)

    def _load(self, members: int) -> object:
        if members < 1 or self._small((1.0,)):
            return members
        whole = _busiest(self.job, members, 1.0, False) if self._whole else 0
        cut = _busiest(self.job, members, 1.0, True) if self._cut else 0
        return whole, cut

    def _small(self, slow: Sequence[float]) -> bool:
        return 2 * self.job.micros * self.job.stages <= MOST_PASSES and max(slow) == 1.0

    def _ask(self, members: tuple[int, ...], slow: tuple[float, ...]) -> Pace | None:
        if min(members) < 1:
            return None
        job = self.job
        if self._small(slow):
            width = max(job.replicas, *members)
            numbers = [[width * stage + one for one in range(count)] for stage, count in enumerate(members)]
            full = [[width * stage + one for one in range(job.replicas)] for stage in range(job.stages)]
            try:
                now = Pipeline.of(job.split, full, job.micros, job.micro)
                return _pace(decide(now, numbers, job.layers, self._machine, self._rules), self._machine)
            except PlanError:
                return None
        found = []
        for cut in (False, True):
            if self._cut if cut else self._whole:
                loads = tuple(_busiest(job, *of_stage, cut) for of_stage in zip(members, slow, strict=True))
                found.append(_of_slice(self._alone, loads, cut, max(slow) > 1, self._rules.graph))
        return min((pace for pace in found if pace is not None), key=lambda pace: pace.seconds, default=None)


def _pace(decision: Decision, machine: Machine) -> Pace:
    heat = 1.0
    if machine.clocks is not None and decision.clocks:
        ratios = [float(clock) / float(machine.clocks.base) for clock in decision.clocks]
        heat = sum(ratio**2 for ratio in ratios) / len(ratios)
    return Pace(float(decision.after.seconds), decision.pipeline.split, heat)


@lru_cache(maxsize=65536)
def _of_slice(job: Job, loads: tuple[Fraction, ...], cut: bool, fine: bool, graph: bool) -> Pace | None:
    """What is said of a slice: jobs of any number of replicas share it."""
    part = _slice(job, loads, cut, fine)
    rules = Rules(assignments=("whole",), graph=graph, horizon=job.horizon)  # it is dealt already
    try:
        return _pace(decide(part, part.members, job.layers, job.machine, rules), job.machine)
    except PlanError:
        return None


def _busiest(job: Job, count: int, slow: float, cut: bool) -> Fraction:
    """What the busiest of so many members of a stage has to do, over what it has when none is missing."""
    usual = job.ticks * job.micro
    slots = -(-job.micros * job.micro // count) if cut else -(-job.micros // count) * job.micro
    load = Fraction(slots, usual)
    if cut and usual > FINEST:
        load = Fraction(-(-load.numerator * FINEST // load.denominator), FINEST)
    return load * Fraction(_parts(slow), SLOWEST)


def _parts(slow: float) -> int:
    """A slow member's factor, rounded up."""
    return -(-round(slow * SLOWEST * 1024) // 1024)


def _slice(job: Job, loads: tuple[Fraction, ...], cut: bool, fine: bool) -> Pipeline:
    """A few replicas of every stage, whose busiest has the load of the busiest of all.

    Micro-batches that are cut stay as many; those that are whole stay as large, unless loads are `fine`.
    """
    columns = -(-max(loads).numerator // max(loads).denominator)
    micro = max(FINEST // job.ticks, 1) if cut or fine else 1
    return Pipeline(job.split, tuple(_dealt(load, columns, job.ticks, micro, cut) for load in loads), micro, job.ticks)


def _dealt(load: Fraction, columns: int, ticks: int, micro: int, cut: bool) -> SlotTable:
    """A stage's table in a slice: every member but the last has the load, the last what is left."""
    usual = ticks * micro
    each = -(-load.numerator * usual // load.denominator)
    slots = columns * usual
    members = -(-slots // each)
    owned: dict[int, list[list[tuple[int, int]]]] = {one: [] for one in range(members)}
    if not cut:  # micro-batches in a row; a slow member's are more, of which the last may be smaller
        for one in range(members):
            first, end = one * each, min((one + 1) * each, slots)
            owned[one] = [[(at, min(at + micro, end))] for at in range(first, end, micro)]
        return SlotTable.of(slots, owned)
    for tick in range(ticks):
        at, end = tick * columns * micro, (tick + 1) * columns * micro
        for one in range(members):
            mine = (tick + 1) * each // ticks - tick * each // ticks
            stop = end if one == members - 1 else min(at + mine, end - (members - 1 - one))
            owned[one].append([(at, stop)])
            at = stop
    return SlotTable.of(slots, owned)


@dataclass(frozen=True, slots=True)
class MeasuredPaces:
    """Seconds of a step that were measured with some numbers of members of a run without stages.

    Attributes:
        seconds: by number of members: `resilin.planner.budget.StepTimes`, or any other function.
        least: members below which nothing can run.
    """

    seconds: CallableSeconds
    least: int = 1

    def of(self, members: tuple[int, ...], slow: tuple[float, ...]) -> Pace | None:
        """See `Paces`."""
        return Pace(self.seconds(members[0]) * max(slow)) if members[0] >= self.least else None

    def level(self, members: int) -> int:
        """See `Paces`."""
        return members

    def move(self, before: Split | None, after: Split | None, members: tuple[int, ...]) -> float:
        """See `Paces`."""
        return 0.0


class CallableSeconds(Protocol):
    """Seconds against a number of members."""

    def __call__(self, members: float, /) -> float:
        """Seconds of one step."""
