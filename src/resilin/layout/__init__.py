"""Region, Place, Layout, plan: one small algebra behind recovery, resharding, checkpoints and sub-models.

Pure Python and numpy: nothing here moves a byte, opens a file or knows a process group.
"""

from resilin.layout.boxes import Boxes
from resilin.layout.census import Count, check, count, gaps
from resilin.layout.errors import LayoutError
from resilin.layout.holdings import Holdings
from resilin.layout.layout import Holding, Layout, merge
from resilin.layout.moves import Move, Plan, Span, TensorMoves
from resilin.layout.place import Place, file, host, rank
from resilin.layout.plan import plan
from resilin.layout.region import Region, flat_range, missing, row_major, tiles

__all__ = [
    "Boxes",
    "Count",
    "Holding",
    "Holdings",
    "Layout",
    "LayoutError",
    "Move",
    "Place",
    "Plan",
    "Region",
    "Span",
    "TensorMoves",
    "check",
    "count",
    "file",
    "flat_range",
    "gaps",
    "host",
    "merge",
    "missing",
    "plan",
    "rank",
    "row_major",
    "tiles",
]
