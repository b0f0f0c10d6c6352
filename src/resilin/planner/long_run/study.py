"""A file of settings played: every way to go on against the same failures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from resilin.cluster.axes import ASSIGNMENTS, Assignment, Clocks, Layers, Machine, PlanError
from resilin.config import UserError
from resilin.planner.budget import StepTimes
from resilin.planner.long_run.course import Course
from resilin.planner.long_run.draw import draw
from resilin.planner.long_run.engine import Diary, play
from resilin.planner.long_run.optimum import daly, fewest, young
from resilin.planner.long_run.outcome import Bill, Outcome
from resilin.planner.long_run.pace import CUT, Job, MeasuredPaces, Paces, ScheduledPaces
from resilin.planner.long_run.restart import Restart
from resilin.planner.long_run.rows import Dropping
from resilin.planner.long_run.settings import StudySettings, WaySettings
from resilin.planner.long_run.stages import Habits, Sharing
from resilin.planner.long_run.templates import Reshaping, Templates
from resilin.planner.long_run.trace import Trace, TraceError
from resilin.planner.long_run.way import Way

Tell = Callable[[str], None]

_AXES: dict[str, tuple[tuple[Assignment, ...], bool, bool]] = {  # ways to deal slots, layers, clocks
    "restart": (("runs",), False, False),
    "recycle": (("whole",), False, False),
    "elaswave-dataflow": (CUT, False, False),
    "elaswave-layers": (("whole",), True, False),
    "elaswave-clocks": (("whole",), False, True),
    "elaswave": (ASSIGNMENTS, True, True),
    "resilin": (("runs",), True, True),
    "resilin-fast": (("runs", "turns"), True, True),
}
_REDO = {"torchft": 1.0, "spares": 1.0, "oobleck": 1.0}
"""torchft does not commit the step in which somebody is lost, Oobleck loses the iteration under way; the others keep
what survivors have computed."""


@dataclass(frozen=True, slots=True)
class Line:
    """One way's result.

    Attributes:
        name: of the way.
        course: that was run: its checkpoints are the way's own.
        outcome: of it.
        cost: in the price's currency.
        energy: in kWh.
        diary: where one was asked for.
    """

    name: str
    course: Course
    outcome: Outcome
    cost: float
    energy: float
    diary: Diary | None = None


@dataclass(frozen=True, slots=True)
class Study:
    """All results.

    Attributes:
        settings: of the study.
        plain: seconds that the run would take if nothing happened and nothing was saved.
        trace: that was played.
        lines: of the ways.
    """

    settings: StudySettings
    plain: float
    trace: Trace
    lines: tuple[Line, ...]

    def line(self, name: str) -> Line:
        """Of one way.

        Raises:
            KeyError: there is none of that name.
        """
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(name)


def job_of(settings: StudySettings) -> Job:
    """The job as the scheduler sees it, its layers' costs such that an intact step takes what the settings say.

    Raises:
        UserError: it cannot be divided like that.
    """
    job = settings.job
    usual = job.clocks[0] if job.clocks else 1.0
    machine = Machine(
        setup=job.move_seconds,
        clocks=Clocks(tuple(sorted(job.clocks)), usual, job.clocks_fixed) if job.clocks else None,
    )
    layers = Layers(job.costs, head=job.head)
    try:
        made = Job(layers, job.stages, settings.replicas, job.micro_batches, job.micro_batch, machine)
        return made.taking(job.step_seconds)
    except PlanError as error:
        raise UserError(f"job: {error}") from None


class Ways:
    """Makes fresh ways; those of one kind share what the scheduler has said.

    Args:
        settings: of the study.
    """

    def __init__(self, settings: StudySettings) -> None:
        self._settings = settings
        self.job = job_of(settings)
        self._paces: dict[str, Paces] = {}

    def paces(self, use: str) -> Paces:
        """Of a way that asks the scheduler."""
        if use not in self._paces:
            measured = self._settings.job.measured
            if measured:
                points = sorted((float(members), seconds) for members, seconds in measured.items())
                self._paces[use] = MeasuredPaces(StepTimes(tuple(points)), self._settings.job.least)
            else:
                assignments, graph, clocks = _AXES[use]
                self._paces[use] = ScheduledPaces(self.job, assignments, graph, clocks)
        return self._paces[use]

    def course(self, way: WaySettings) -> Course:
        """With the checkpoints that a way takes."""
        settings = self._settings
        save, step = settings.checkpoint.seconds, self._step(way)
        interval = self._interval(way)
        plain = settings.steps * step
        return Course(settings.steps, step, interval, save, settings.give_up * plain)

    def _step(self, way: WaySettings) -> float:
        if self._settings.job.measured and way.use in _AXES:
            pace = self.paces(way.use).of((self._settings.replicas,), (1.0,))
            assert pace is not None
            return pace.seconds
        return self._settings.job.step_seconds

    def _interval(self, way: WaySettings) -> float:
        settings = self._settings
        save = settings.checkpoint.seconds
        wanted = way.interval or ("daly" if way.use == "restart" else settings.checkpoint.every)
        if not isinstance(wanted, str):
            return wanted
        if wanted == "none":
            return math.inf
        apart = self._apart()
        found = {"young": young, "daly": daly, "least": fewest}[wanted](save, apart)
        return found if found > 0 else settings.job.step_seconds  # saving costs nothing: after every step

    def _apart(self) -> float:
        """Mean seconds between two interruptions: by the laws, or as a trace has them."""
        settings = self._settings
        rate = self._observed if settings.trace is not None else settings.failures.rate(settings.cluster.machines)
        return 1 / rate if rate else math.inf

    _observed = 0.0

    def observe(self, trace: Trace) -> None:
        """Take the rate of interruptions from a trace that was not drawn."""
        times = {float(time) for time, kind in zip(trace.time_E, trace.kind_E, strict=True) if kind < 2}
        self._observed = len(times) / trace.seconds

    def make(self, way: WaySettings) -> Way:
        """A fresh one.

        Raises:
            UserError: the cluster cannot go on that way.
        """
        settings, recovery = self._settings, self._settings.recovery
        seats, stages, members = settings.cluster.machines, settings.job.stages, settings.members
        restart = settings.checkpoint.restart_seconds
        seconds = recovery.seconds if way.seconds is None else way.seconds
        joining = recovery.join_seconds if way.join_seconds is None else way.join_seconds
        redo = _REDO.get(way.use, 0.0) if way.redo is None else way.redo
        rows = seats // stages
        try:
            if way.use == "restart":
                paces = self.paces("restart") if way.fewer else None
                took = restart if way.seconds is None else way.seconds
                saving = settings.checkpoint.seconds
                return Restart(seats, stages, paces, members, took, saving, self._apart())
            if way.use == "spares":
                return Dropping(seats, stages, seconds, redo, 1, restart, way.spare)
            if way.use == "torchft":
                if way.least > rows:
                    raise UserError(f"ways: least ({way.least}) is more than the {rows} machines of each stage")
                return Dropping(seats, stages, seconds, redo, way.least, restart)
            if way.use == "oobleck":
                shortest = way.shortest if way.shortest is not None else -(-stages // 2)
                return Reshaping(seats, Templates(self.job, members), stages, shortest, seconds, joining, redo, restart)
            full = way.use == "recycle"  # every replica has all states: optimizers are not divided
            habits = Habits(
                seconds,
                joining,
                redo,
                copies=-1 if full else recovery.copies,
                moving=way.use.startswith("resilin"),
                restart=restart,
            )
            return Sharing(seats, stages, members, self.paces(way.use), habits)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"ways: {way.use}: {error}") from None


def trace_of(settings: StudySettings, seconds: float) -> Trace:
    """The failures of a study.

    Args:
        settings: that name a file, or laws.
        seconds: to cover, where they are drawn.

    Raises:
        UserError: the file cannot be used, or is of another cluster.
    """
    machines = settings.cluster.machines + settings.cluster.spares
    if settings.trace is None:
        try:
            return draw(settings.failures, machines, seconds, settings.seed)
        except ValueError as error:
            raise UserError(f"failures: {error}") from None
    try:
        found = Trace.read(settings.trace)
    except TraceError as error:
        raise UserError(str(error)) from None
    if found.machines != machines:
        raise UserError(
            f"{settings.trace} is of {found.machines} machines; cluster.machines and cluster.spares are {machines} "
            "together"
        )
    return found


def study(settings: StudySettings, tell: Tell | None = None, diaries: bool = False) -> Study:
    """Play every way.

    Drawn failures are drawn for as long as the longest run needs; a trace that is read ends where it ends, and runs
    with it.

    Args:
        settings: of the study.
        tell: receives a line for each way as it is done.
        diaries: whether to keep what every run was at, when.

    Raises:
        UserError: something cannot be as it is asked for.
    """
    ways = Ways(settings)
    plain = settings.steps * settings.job.step_seconds
    trace = trace_of(settings, min(1.5, settings.give_up) * plain)
    if settings.trace is not None:
        ways.observe(trace)
    lines = []
    bill = Bill(
        settings.cluster.price * settings.cluster.devices,
        settings.cluster.watts * settings.cluster.devices,
        settings.cluster.idle_watts * settings.cluster.devices,
        settings.cluster.pay == "always",
    )
    machines = settings.cluster.machines + settings.cluster.spares
    for name, way in settings.ways.items():
        course = ways.course(way)
        while True:
            diary = Diary() if diaries else None
            known = min(course.limit, trace.seconds)
            outcome = play(ways.make(way), trace, replace(course, limit=known), settings.cluster.spares, diary)
            if outcome.finished or settings.trace is not None or trace.seconds >= course.limit:
                break
            trace = trace_of(settings, min(2 * trace.seconds, course.limit))
        line = Line(name, course, outcome, bill.cost(outcome, machines), bill.energy(outcome), diary)
        lines.append(line)
        if tell is not None:
            tell(f"{name}: goodput {outcome.goodput:.4f}" + ("" if outcome.finished else ", given up"))
    return Study(settings, plain, trace, tuple(lines))
