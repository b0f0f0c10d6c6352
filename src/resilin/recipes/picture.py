"""The plot of a recipe, drawn from its results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from resilin.recipes.findings import Plot


def draw(plots: tuple[Plot, ...], path: Path) -> bool:
    """One picture with a panel for each plot.

    Returns:
        False where there is nothing to draw or matplotlib is not installed.
    """
    if not plots:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(plots))
    rows = math.ceil(len(plots) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 3.8 * rows), squeeze=False)
    for place, axis in zip(plots, axes.flat, strict=False):
        _panel(place, axis)
    for axis in axes.flat[len(plots) :]:
        axis.set_visible(False)
    figure.tight_layout()
    # No date or version inside: equal results give an equal file.
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
    return True


def _panel(plot: Plot, axis: Any) -> None:
    for line in plot.lines:
        points = [(x, y, s) for x, y, s in zip(line.x, line.y, line.spread or (None,) * len(line.x), strict=True)]
        kept = [(x, y, s or 0.0) for x, y, s in points if y is not None]
        if kept:
            x, y, spread = (list(values) for values in zip(*kept, strict=True))
            axis.errorbar(x, y, yerr=spread if line.spread else None, label=line.label, marker=".", capsize=2)
    if plot.x_log:
        axis.set_xscale("log")
    if plot.y_log:
        axis.set_yscale("log")
    axis.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
    if 1 < len(plot.lines) <= 12:
        axis.legend(fontsize=7)
