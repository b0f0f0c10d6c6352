"""Long runs as pictures, with matplotlib (the extra `plots`): what a run was at, when; goodput against one quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from resilin.config import UserError
from resilin.planner.long_run.study import Line, Study

_COLOURS = {"stop": "#d95f02", "stand": "#777777"}
_MOST_STRETCHES = 20_000


def _figure(width: float, height: float, rows: int = 1) -> tuple[Any, Any, Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'resilin[plots]'") from None
    # Text stays text and names are fixed, so that a picture made again is the same file.
    context = rc_context({"svg.fonttype": "none", "svg.hashsalt": "resilin"})
    figure = Figure(figsize=(width, height), layout="constrained")
    return context, figure, figure.subplots(rows, 1, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else None)


def timeline(study: Study, path: Path) -> None:
    """Write a picture of all runs of a study to one scale, a row for each way.

    The height of the blue is the speed of useful work. Orange: noticing, joining, restarting. Grey: too few machines. A
    red line goes from where a run was to what it had saved.

    Args:
        study: played with diaries.
        path: of the picture; its ending says what it is (png, svg, pdf).

    Raises:
        UserError: matplotlib is not installed, there are no diaries, or too much happened to be seen.
    """
    lines = [line for line in study.lines if line.diary is not None]
    if not lines:
        raise UserError("there is nothing to draw: play the study with diaries=True")
    most = max(len(line.diary.stretches) for line in lines if line.diary is not None)
    if most > _MOST_STRETCHES:
        raise UserError(
            f"{most:,} stretches of one run are too many for a picture: draw a shorter run, or a smaller cluster"
        )
    context, figure, axes = _figure(12, 0.62 * len(lines) + 0.9, len(lines))
    longest = max(line.outcome.seconds for line in lines) / 86400
    with context:
        for row, line in enumerate(lines):
            _row(axes[row][0], line, longest)
        for row in range(len(lines) - 1):
            axes[row][0].set_xticklabels([])
        axes[-1][0].set_xlabel("days", fontsize=8)
        _save(figure, path)


def _row(axes: Any, line: Line, longest: float) -> None:
    assert line.diary is not None
    end = line.outcome.seconds
    # A stop's own end is noted when it begins; what happens before that end supersedes it.
    stretches: list[tuple[float, str, float, int]] = []
    for stretch in line.diary.stretches:
        while stretches and stretches[-1][0] > stretch[0]:
            stretches.pop()
        stretches.append(stretch)
    stretches = [stretch for stretch in stretches if stretch[0] < end] + [(end, "", 0.0, 0)]
    for kind in ("work", "stop", "stand"):
        spans = [(a[0] / 86400, (b[0] - a[0]) / 86400, a[2]) for a, b in pairwise(stretches) if a[1] == kind]
        if kind == "work":
            axes.bar(
                [start for start, _, _ in spans], [speed for _, _, speed in spans], [width for _, width, _ in spans],
                align="edge", color="#6baed6", linewidth=0,
            )  # fmt: skip
        else:
            axes.broken_barh(
                [span[:2] for span in spans],
                (0, 1),
                facecolors=_COLOURS[kind],
                edgecolors=_COLOURS[kind],
                linewidth=0.6,
            )
    for at, to in line.diary.back:
        axes.plot([to / 86400, at / 86400], [0.06, 0.06], color="#cb181d", linewidth=1.2, solid_capstyle="butt")
    done = "" if line.outcome.finished else ", given up"
    axes.set_title(f"{line.name}: goodput {100 * line.outcome.goodput:.1f} %{done}", fontsize=8, loc="left", pad=2)
    axes.set_xlim(0, longest * 1.005)
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 1])
    axes.tick_params(labelsize=6)


def curves(
    points: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    label: str,
    title: str = "",
    upright: str = "goodput",
) -> None:
    """Write a picture of goodput against something, a line for each way, on a logarithmic scale.

    Args:
        points: by way, (the something, goodput), ascending.
        path: of the picture.
        label: of the something.
        title: of the picture.
        upright: what the other axis shows.

    Raises:
        UserError: matplotlib is not installed, or there is nothing to draw.
    """
    if not any(points.values()):
        raise UserError("there is nothing to draw: give ways, and values to try")
    context, figure, axes = _figure(8, 4.6)
    with context:
        place = axes[0][0]
        marks = "os^vD<>pP*Xh"
        for number, (name, row) in enumerate(points.items()):
            place.plot(
                [x for x, _ in row], [y for _, y in row], marker=marks[number % len(marks)], markersize=4,
                linewidth=1.2, label=name,
            )  # fmt: skip
        place.set_xscale("log")
        place.set_ylim(0, 1.02)
        place.set_xlabel(label, fontsize=9)
        place.set_ylabel(upright, fontsize=9)
        place.set_title(title, fontsize=10, loc="left")
        place.grid(alpha=0.3)
        place.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        place.tick_params(labelsize=8)
        _save(figure, path)
