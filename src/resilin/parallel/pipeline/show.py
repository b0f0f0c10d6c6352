"""Schedules and timelines for people: drawn in characters, with what each rank does and holds."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from resilin.parallel.pipeline.build import METHODS, build
from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.picture import draw, gantt
from resilin.parallel.pipeline.published import Setting, compare, number, table
from resilin.parallel.pipeline.schedule import Schedule
from resilin.parallel.pipeline.simulate import simulate
from resilin.parallel.pipeline.timeline import Time, Timeline
from resilin.parallel.pipeline.validate import peak_in_flight, validate


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for.

    Attributes:
        setting: of the pipeline, with one stage a rank where nothing was said.
        chunks: stages a rank, where something was.
        group: of interleaved schedules.
        transfer: time of a message.
    """

    setting: Setting
    chunks: int | None
    group: int | None
    transfer: Fraction

    @classmethod
    def parse(
        cls,
        ranks: int,
        micros: int,
        chunks: int | None,
        group: int | None,
        forward: str,
        input_gradient: str,
        weight_gradient: str,
        transfer: str,
    ) -> Wanted:
        """From what a user typed.

        Raises:
            ScheduleError: a time that is no number, or negative.
        """
        took = [_time(text) for text in (forward, input_gradient, weight_gradient, transfer)]
        return cls(Setting(ranks, chunks or 1, micros, *took[:3]), chunks, group, took[3])


@dataclass(frozen=True, slots=True)
class Shown:
    """Timelines with their text.

    Attributes:
        text: for people.
        timelines: (title, simulated or measured).
        schedule: the order, where there is one and it is known.
    """

    text: str
    timelines: tuple[tuple[str, Timeline], ...]
    schedule: Schedule | None = None

    def write(self, picture: Path | None, csv: Path | None, times: Path | None) -> None:
        """Writes what has a path: the picture, the order, the times.

        Raises:
            ScheduleError: the order of measured times, or one file for several; or as `draw` does.
        """
        if csv is not None and self.schedule is None:
            raise ScheduleError("only a single schedule can be written with --csv: name one")
        if times is not None and len(self.timelines) > 1:
            raise ScheduleError("only the times of a single schedule can be written with --times: name one")
        if picture is not None:
            draw(self.timelines, picture)
        if times is not None:
            times.write_text(self.timelines[0][1].text(), encoding="utf-8")
        if csv is not None and self.schedule is not None:
            csv.write_text(self.schedule.text(), encoding="utf-8")


def all_methods(wanted: Wanted) -> Shown:
    """A table of every method, simulated beside published; interleaved ones have two stages a rank if none are said.

    Raises:
        ScheduleError: something was said that holds for single schedules only.
    """
    if wanted.group is not None or wanted.transfer:
        raise ScheduleError("a comparison has neither groups nor transfers, which the papers' formulas leave out")
    s = wanted.setting
    costs = compare(Setting(s.ranks, wanted.chunks or 2, s.micros, s.forward, s.input, s.weight))
    return Shown(table(costs), tuple((one.name, one.timeline) for one in costs))


def one_schedule(name: str, wanted: Wanted) -> Shown:
    """A method, or a file in torch's form of actions, checked and simulated.

    Raises:
        ScheduleError: no such method or file, or a schedule that cannot run.
    """
    s = wanted.setting
    if name.endswith(".csv"):
        try:
            schedule = Schedule.parse(Path(name).read_text(encoding="utf-8"), Path(name).stem)
        except OSError as error:
            raise ScheduleError(f"cannot read {name}: {error.strerror}") from None
    else:
        method = METHODS.get(name)
        chunks = wanted.chunks or (method and method.chunks) or (2 if method and method.grouped else 1)
        schedule = build(name, chunks * s.ranks, s.ranks, s.micros, wanted.group)
    validate(schedule)
    chunks = max(schedule.stages // schedule.ranks, 1)
    costs = Setting(schedule.ranks, chunks, schedule.micros, s.forward, s.input, s.weight).costs()
    timeline = simulate(schedule, costs, wanted.transfer)
    title = f"{schedule.name}: {schedule.stages} stages on {schedule.ranks} ranks, {schedule.micros} micro-batches"
    text = f"{title}\n{gantt(timeline)}\n{_ranks(timeline, schedule)}"
    return Shown(text, ((title, timeline),), schedule)


def measured_times(path: Path) -> Shown:
    """The times that a run measured, from a file as `Timeline.text` writes it.

    Raises:
        ScheduleError: it cannot be read.
    """
    try:
        timeline = Timeline.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScheduleError(f"cannot read {path}: {error.strerror}") from None
    title = f"{path.stem}: {len(timeline.records)} actions on {timeline.ranks} ranks"
    return Shown(f"{title}\n{gantt(timeline)}\n{_ranks(timeline, None)}", ((title, timeline),))


def _ranks(timeline: Timeline, schedule: Schedule | None) -> str:
    lines = []
    held = peak_in_flight(schedule) if schedule else ()
    rows = zip(timeline.busy(), timeline.idle(), timeline.gaps(), strict=True)
    for rank, (busy, idle, gap) in enumerate(rows):
        keeps = f", holds the activations of {number(held[rank])} F" if schedule else ""
        lines.append(f"rank {rank}: computes {number(busy)}, idle {number(idle)} (pauses {number(gap)}){keeps}")
    total = _bubble(timeline.bubble)
    return "\n".join([*lines, f"time {number(timeline.makespan)}, bubble {total} of the computing time"])


def _bubble(bubble: Time) -> str:
    exact = f" ({bubble})" if isinstance(bubble, Fraction) and bubble.denominator < 10_000 else ""
    return f"{float(bubble):.2%}{exact}"


def _time(text: str) -> Fraction:
    try:
        found = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ScheduleError(f"{text!r} is no time: write 2, 0.5 or 1/3") from None
    if found < 0:
        raise ScheduleError(f"a time cannot be negative: {text}")
    return found
