"""Timelines as pictures: in characters, or in a file with matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.schedule import Action, Kind
from resilin.parallel.pipeline.timeline import Time, Timeline

_IDLE, _FILL = "·", "─"
_COLOURS = {Kind.F: "Blues", Kind.B: "Greens", Kind.I: "Greens", Kind.W: "Oranges"}
_WORDS = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradient", Kind.W: "weight gradient"}
_MOST_BOXES = 8192


def gantt(timeline: Timeline, columns: int = 160) -> str:
    """A line for each rank, time from left to right: `F3` with the micro-batch, or `4F3` where stages share a rank.

    Every action is as long as it takes, a dot is a rank that waits. When actions with their numbers need more than
    `columns` characters, only their kinds are drawn, in small letters for a rank's later stages, and what is shorter
    than a character may be hidden.

    Args:
        timeline: simulated or measured.
        columns: the most characters of a line, without the rank.
    """
    start, makespan = timeline.start, timeline.makespan
    labels = _labels(timeline)
    shortest = min((r.end - r.start for r in timeline.records if r.end > r.start), default=makespan) or 1
    longest = max(map(len, labels.values()))
    each = (longest + 1) / _exact(shortest)
    if any(((_exact(r.end) - _exact(start)) * each).denominator > 1 for r in timeline.records):
        each = (longest + 2) / _exact(shortest)  # room for rounding
    full = makespan * each <= columns
    if not full:
        each = Fraction(columns) / _exact(makespan)
        later = _later(timeline)
        labels = {one: one.kind.value.lower() if later[one.stage] else one.kind.value for one in labels}
    width = round(makespan * each)
    rows = [[_IDLE] * width for _ in range(timeline.ranks)]
    for record in timeline.records:
        first, end = (round((_exact(at) - _exact(start)) * each) for at in (record.start, record.end))
        text = labels[record.action].ljust(end - first, _FILL)
        rows[record.rank][first:end] = text[: end - first]
    deepest = len(str(timeline.ranks - 1))
    return "\n".join(f"rank {rank:>{deepest}} |{''.join(row)}|" for rank, row in enumerate(rows))


def draw(timelines: Sequence[tuple[str, Timeline]], path: Path, unit: str = "") -> None:
    """Write a picture of some timelines under each other, to one scale: a row for each rank, a box for each action.

    Forwards are blue, backwards and input gradients green, weight gradients orange; of several stages on a rank the
    later ones are darker.

    Args:
        timelines: (title, timeline).
        path: of the picture; its ending says what it is (png, svg, pdf).
        unit: of the times.

    Raises:
        ScheduleError: matplotlib is not installed, there is nothing to draw, or far too much.
    """
    try:
        from matplotlib import colormaps, rc_context
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ScheduleError("pictures need matplotlib: pip install 'resilin[plots]'") from None
    boxes = sum(len(timeline.records) for _, timeline in timelines)
    if not 0 < boxes <= _MOST_BOXES:
        raise ScheduleError(f"{boxes} actions cannot be drawn: show between 1 and {_MOST_BOXES}")
    longest = max(float(timeline.makespan) for _, timeline in timelines) or 1.0
    kinds = {record.action.kind for _, timeline in timelines for record in timeline.records}
    high = [0.28 * timeline.ranks + 0.5 for _, timeline in timelines]
    # Text stays text and names are fixed, so that a picture made again is the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "resilin"}):
        figure = Figure(figsize=(12, sum(high) + 0.3), layout="constrained")
        axes = figure.subplots(len(timelines), 1, squeeze=False, height_ratios=high, sharex=True)
        for row, (title, timeline) in enumerate(timelines):
            _rows(axes[row][0], timeline, longest)
            axes[row][0].set_title(title, fontsize=9, loc="left")
        axes[-1][0].set_xlabel(f"time ({unit})" if unit else "time", fontsize=8)
        shown = [Patch(facecolor=colormaps[_COLOURS[kind]](0.5), label=_WORDS[kind]) for kind in Kind if kind in kinds]
        figure.legend(handles=shown, loc="upper right", ncols=len(shown), fontsize=7, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def _rows(axes: Any, timeline: Timeline, longest: float) -> None:
    from matplotlib import colormaps

    labels, later, start = _labels(timeline), _later(timeline), float(timeline.start)
    for rank in range(timeline.ranks):
        mine = [record for record in timeline.records if record.rank == rank]
        spans = [(float(record.start) - start, float(record.end - record.start)) for record in mine]
        faces = [colormaps[_COLOURS[one.action.kind]](0.35 + 0.35 * later[one.action.stage]) for one in mine]
        axes.broken_barh(spans, (rank - 0.5, 1), facecolors=faces, edgecolors="white", linewidth=0.4)
        for (left, width), record in zip(spans, mine, strict=True):
            label = labels[record.action]
            if width / longest > 0.0055 * len(label):
                axes.text(left + width / 2, rank, label, ha="center", va="center", fontsize=6)
    axes.set_xlim(0, longest)
    axes.set_ylim(timeline.ranks - 0.5, -0.5)
    axes.set_yticks(range(timeline.ranks), [f"rank {rank}" for rank in range(timeline.ranks)])
    axes.set_facecolor("#eeeeee")
    axes.tick_params(labelsize=7)


def _labels(timeline: Timeline) -> dict[Action, str]:
    alone = not any(_later(timeline).values())
    return {r.action: f"{r.action.kind.value}{r.action.micro}" if alone else str(r.action) for r in timeline.records}


def _later(timeline: Timeline) -> dict[int, float]:
    """For each stage, how late it comes among its rank's: 0 is the first (or the only one), 1 the last."""
    held: dict[int, set[int]] = {}
    for record in timeline.records:
        held.setdefault(record.rank, set()).add(record.action.stage)
    return {
        stage: place / max(len(stages) - 1, 1) for stages in held.values() for place, stage in enumerate(sorted(stages))
    }


def _exact(time: Time) -> Fraction:
    return Fraction(time)
