"""A division of a run over workers as a picture (matplotlib, the extra `plots`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resilin.config import UserError
from resilin.parallel.stretches import stretches
from resilin.run.who_does_what import Division, Share

_MOST = 256
_COLOURS = ("Blues", "Greens", "Oranges", "Purples")


def draw_division(division: Division, path: Path) -> None:
    """Write a picture: a row of boxes for each pipeline rank, a box for each worker; those that divide matrices touch.

    Workers of one colour have the same blocks; of one shade, the same part of each matrix.

    Args:
        division: of a run.
        path: of the picture; its ending says what it is (png, svg, pdf).

    Raises:
        UserError: matplotlib is not installed, or there are too many workers to be drawn.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'resilin[plots]'") from None
    world = division.world
    if world.size > _MOST:
        raise UserError(f"{world.size} workers cannot be drawn: at most {_MOST} can")
    stages, tensor = world.axis("pp"), world.axis("tp")
    across = world.size // stages
    # Text stays text and names are fixed, so that a picture made again is the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "resilin"}):
        figure = Figure(figsize=(max(6.0, 1.9 * across + 1), 1.25 * stages + 0.4), layout="constrained")
        axes = figure.subplots()
        for share in division.shares:
            row, column = divmod(share.rank, across)
            _box(axes, share, row, column + 0.25 * (column // tensor), tensor)
        if stages > 1:
            for row in range(stages - 1):
                for column in range(across):
                    x = column + 0.25 * (column // tensor) + 0.5
                    axes.annotate(
                        "", (x, row + 1.03), (x, row + 0.82), arrowprops={"arrowstyle": "<->", "color": "#555555"}
                    )
        axes.set_xlim(-0.1, across + 0.25 * (across // tensor))
        axes.set_ylim(stages - 0.1, -0.1)
        axes.set_axis_off()
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def _box(axes: Any, share: Share, row: int, x: float, tensor: int) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    shade = 0.25 + 0.3 * share.coordinates.get("tp", 0) / max(1, tensor - 1)
    face = colormaps[_COLOURS[row % len(_COLOURS)]](shade)
    axes.add_patch(Rectangle((x, row), 1.0, 0.8, facecolor=face, edgecolor="#333333", linewidth=0.8))
    blocks = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in share.blocks)
    lines = [f"worker {share.rank}", f"blocks {blocks}" if blocks else ""]
    runs = ", ".join(f"{run[0]}-{run[-1]}" for run in stretches(share.slots))
    lines.append(f"slots {runs}" if runs else "no slots")
    parts = {"tp": "matrices", "cp": "rows", "ep": "experts"}
    lines += [f"part {share.coordinates[axis]} of {word}" for axis, word in parts.items() if axis in share.coordinates]
    axes.text(x + 0.5, row + 0.4, "\n".join(line for line in lines if line), ha="center", va="center", fontsize=8)
