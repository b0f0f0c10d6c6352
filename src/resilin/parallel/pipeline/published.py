"""What the papers say a schedule costs, to be laid beside what is simulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from resilin.parallel.pipeline.build import METHODS, build
from resilin.parallel.pipeline.simulate import Costs, simulate
from resilin.parallel.pipeline.timeline import Time, Timeline
from resilin.parallel.pipeline.validate import peak_in_flight


@dataclass(frozen=True, slots=True)
class Setting:
    """A pipeline, and what one rank takes for its whole share of one micro-batch.

    Attributes:
        ranks: p.
        chunks: v, stages a rank.
        micros: m.
        forward: t_f of all stages of a rank together.
        input: t_i, likewise.
        weight: t_w, likewise; a whole backward is both.
    """

    ranks: int
    chunks: int
    micros: int
    forward: Fraction = Fraction(1)
    input: Fraction = Fraction(1)
    weight: Fraction = Fraction(1)

    @property
    def whole(self) -> Fraction:
        """What one micro-batch takes a rank."""
        return self.forward + self.input + self.weight

    def costs(self) -> Costs:
        """Of one stage."""
        return Costs(self.forward / self.chunks, self.input / self.chunks, self.weight / self.chunks)


@dataclass(frozen=True, slots=True)
class Formula:
    """What a paper gives for a schedule.

    Attributes:
        bubble: idle time of a rank in a batch, in words.
        bubble_of: the same as a number; None where the formula does not hold.
        held: activations on the fullest rank, in words; 1 is a rank's whole share for one micro-batch.
        held_of: the same as a number.
        source: the paper.
    """

    bubble: str
    bubble_of: Callable[[Setting], Fraction | None]
    held: str
    held_of: Callable[[Setting], Fraction | None]
    source: str


def _full(s: Setting) -> bool:
    return s.micros >= s.ranks


def _interleaved_held(s: Setting) -> Fraction | None:
    holds = s.chunks > 1 and s.micros >= 2 * s.ranks and s.micros % s.ranks == 0
    return s.ranks + Fraction(s.ranks - 1, s.chunks) if holds else None


def _zb_h1(s: Setting) -> Fraction | None:
    holds = _full(s) and s.weight <= min(s.forward, s.input)
    return (s.ranks - 1) * (s.forward + s.input - s.weight) if holds else None


_GPIPE = "Huang et al. 2019, arXiv 1811.06965"
_MEGATRON = "Narayanan et al. 2021, arXiv 2104.04473"
_ZERO_BUBBLE = "Qi et al. 2023, arXiv 2401.10241"
FORMULAS = {
    "gpipe": Formula(
        "(p - 1)(t_f + t_b)",
        lambda s: (s.ranks - 1) * s.whole if s.chunks == 1 else None,
        "m",
        lambda s: Fraction(s.micros),
        _GPIPE,
    ),
    "1f1b": Formula(
        "(p - 1)(t_f + t_b)",
        lambda s: (s.ranks - 1) * s.whole,
        "min(m, p)",
        lambda s: Fraction(min(s.micros, s.ranks)),
        _MEGATRON,
    ),
    "interleaved": Formula(
        "(p - 1)(t_f + t_b) / v",
        lambda s: (s.ranks - 1) * s.whole / s.chunks if _full(s) else None,
        "p (1 + (p - 1) / (p v))",
        _interleaved_held,
        _MEGATRON,
    ),
    "zb-h1": Formula(
        "(p - 1)(t_f + t_i - t_w)", _zb_h1, "min(m, p)", lambda s: Fraction(min(s.micros, s.ranks)), _ZERO_BUBBLE
    ),
    "zb-v": Formula(
        "0 inside each rank's own work",
        lambda s: None,
        "min(m, p)",
        lambda s: Fraction(min(s.micros, s.ranks)),
        _ZERO_BUBBLE,
    ),
}
"""By the name of the schedule; what has no paper of its own is not here."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A schedule as simulated, beside what its paper says.

    Attributes:
        name: of the schedule.
        setting: with the stages a rank that this schedule has.
        timeline: as simulated.
        held: activations on the fullest rank; 1 is a rank's whole share for one micro-batch.
        bubble: idle time over computing time.
        published_bubble: the paper's, likewise; None where it gives none or its conditions do not hold.
        published_held: likewise.
    """

    name: str
    setting: Setting
    timeline: Timeline
    held: Time
    bubble: Time
    published_bubble: Fraction | None
    published_held: Fraction | None


def cost(name: str, setting: Setting, group: int | None = None) -> Cost:
    """Builds, simulates and compares one schedule.

    Raises:
        ScheduleError: as `build` does.
    """
    stages = setting.chunks * setting.ranks
    schedule = build(name, stages, setting.ranks, setting.micros, group)
    timeline = simulate(schedule, setting.costs())
    formula = FORMULAS.get(name)
    idle = formula.bubble_of(setting) if formula else None
    return Cost(
        name,
        setting,
        timeline,
        Fraction(max(peak_in_flight(schedule))) / setting.chunks,
        timeline.bubble,
        None if idle is None else idle / (setting.micros * setting.whole),
        formula.held_of(setting) if formula and group is None else None,
    )


def compare(setting: Setting) -> list[Cost]:
    """Every method on one pipeline; those that fix their stages a rank have their own, the others `setting`'s."""
    found = []
    for name, method in METHODS.items():
        chunks = method.chunks or (setting.chunks if method.grouped else 1)
        found.append(
            cost(
                name,
                Setting(setting.ranks, chunks, setting.micros, setting.forward, setting.input, setting.weight),
            )
        )
    return found


def table(costs: list[Cost]) -> str:
    """A line for each schedule: simulated, and published where that holds."""
    head = ("schedule", "stages a rank", "time", "bubble", "published", "pauses", "held", "published")
    rows = [head]
    for one in costs:
        rows.append(
            (
                one.name,
                str(one.setting.chunks),
                number(one.timeline.makespan),
                _percent(one.bubble),
                "-" if one.published_bubble is None else _percent(one.published_bubble),
                number(max(one.timeline.gaps())),
                number(one.held),
                "-" if one.published_held is None else number(one.published_held),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(w) if n else cell.ljust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def number(value: Time) -> str:
    """A time in few characters."""
    return f"{float(value):.6g}"


def _percent(value: Time) -> str:
    return f"{float(value):.2%}"
