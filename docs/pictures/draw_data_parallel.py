"""Draws data-parallel.svg: eight micro-batches on two workers, the tree of their sums, and who owns which shards.

python docs/pictures/draw_data_parallel.py docs/pictures/data-parallel.svg
"""

import sys
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from resilin.layout.dealing import deal
from resilin.parallel.canonical import blocks_of
from resilin.parallel.workers import run_of

MICROS, WORKERS, SHARDS = 8, 2, 8  # a parameter has 64 virtual shards; eight can be seen
COLOURS = [colormaps["Blues"](0.45), colormaps["Oranges"](0.45)]


def draw(path: str) -> None:
    """Write the picture."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "resilin"}):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        axes = figure.subplots()
        runs = [run_of(MICROS, WORKERS, worker) for worker in range(WORKERS)]
        owner_of = {micro: worker for worker, run in enumerate(runs) for micro in run}
        whole = {block for run in runs for block in blocks_of(run.start, run.stop)}
        for micro in range(MICROS):
            box(axes, micro, 0, 1, COLOURS[owner_of[micro]], f"micro-batch {micro}")
        height = 1
        while 2**height <= MICROS:
            width = 2**height
            for start in range(0, MICROS, width):
                inside = any(s <= start and start + width <= s + 2**h for s, h in whole)
                colour = COLOURS[owner_of[start]] if inside else "#dddddd"
                text = f"sum of {start}-{start + width - 1}" + ("" if inside else ": each owner adds its part of both")
                box(axes, start, height, width, colour, text)
            height += 1
        owners = deal(SHARDS, WORKERS)
        for shard, owner in enumerate(owners):
            box(axes, shard * MICROS / SHARDS, height + 0.5, MICROS / SHARDS, COLOURS[owner], f"shard {shard}")
        label = "gradient, moments and update of each parameter's shards: by owner; then weights to all"
        axes.text(0, height + 0.32, label, fontsize=9)
        for worker, colour in enumerate(COLOURS):
            axes.text(worker * 1.6, -0.15, f"■ worker {worker}", color=colour, fontsize=10)
        axes.set_xlim(-0.05, MICROS + 0.05)
        axes.set_ylim(height + 1.4, -0.4)
        axes.set_axis_off()
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def box(axes: Any, x: float, y: float, width: float, colour: object, text: str) -> None:
    """A labelled box."""
    axes.add_patch(Rectangle((x, y), width, 0.8, facecolor=colour, edgecolor="white", linewidth=1.5))
    axes.text(x + width / 2, y + 0.4, text, ha="center", va="center", fontsize=8)


if __name__ == "__main__":
    draw(sys.argv[1])
