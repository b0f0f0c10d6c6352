"""Layouts as pictures, with matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resilin.layout.errors import LayoutError
from resilin.layout.layout import Layout

_MOST_BOXES = 4096


def draw(layouts: Sequence[tuple[str, Layout]], names: Sequence[str], path: Path) -> None:
    """Write a picture of some tensors: a row for each, a column for each layout, a colour for each place.

    Copies of a region are drawn beside each other inside it. A tensor with more than two dimensions is drawn with the
    later ones side by side; one with a single dimension as a bar.

    Args:
        layouts: (title, layout), such as the one there is and the one that is wanted.
        names: of the tensors.
        path: of the picture; its ending says what it is (png, svg, pdf).

    Raises:
        LayoutError: matplotlib is not installed; or there is nothing to draw.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise LayoutError("pictures need matplotlib: pip install 'resilin[plots]'") from None
    if not names or not layouts:
        raise LayoutError("there is no tensor to draw: does the pattern match a name?")
    places = list(dict.fromkeys(place for _, layout in layouts for place in layout.places))
    colour = {place: colormaps["turbo"]((row + 0.5) / len(places)) for row, place in enumerate(places)}
    figure = Figure(figsize=(5 * len(layouts), 0.4 + 2.2 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(layouts), squeeze=False)
    for row, name in enumerate(names):
        for column, (title, layout) in enumerate(layouts):
            _tensor(axes[row][column], layout, name, colour)
            axes[row][column].set_title(f"{title}: {name}" if title else name, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _tensor(axes: Any, layout: Layout, name: str, colour: dict[Any, Any]) -> None:
    from matplotlib.patches import Rectangle

    held = layout.tensors[name]
    if len(held) > _MOST_BOXES:
        raise LayoutError(f"{name}: {len(held)} regions are too many for a picture; draw a smaller mesh")
    shape = held.shape
    high = shape[0] if len(shape) > 1 else 1
    wide = max(held.numel // max(high, 1), 1)
    copies: dict[Any, list[int]] = {}
    for row, region in enumerate(held.boxes):
        copies.setdefault(region, []).append(row)
    for region, rows in copies.items():
        flat = list(region.flat(shape)) if len(shape) != 2 else []
        boxes = (
            [(region.offsets[1], region.offsets[0], region.sizes[1], region.sizes[0])]
            if len(shape) == 2
            else [(first % wide, first // wide, min(n, wide), -(-n // wide)) for first, n in flat[:_MOST_BOXES]]
        )
        for x, y, width, height in boxes:
            part = width / len(rows)
            for number, row in enumerate(rows):
                place, left = layout.places[held.places[row]], x + number * part
                face = colour[place]
                axes.add_patch(Rectangle((left, y), part, height, facecolor=face, edgecolor="white", lw=0.4))
                if len(held) <= 64 and part > wide / 40 and height > high / 20:
                    middle = left + part / 2, y + height / 2
                    axes.text(*middle, place.name, ha="center", va="center", fontsize=6)
    axes.set_xlim(0, wide)
    axes.set_ylim(high, 0)
    axes.set_xticks([0, wide])
    axes.set_yticks([0, high] if high > 1 else [])
    axes.tick_params(labelsize=6)
