"""Region, Place, Layout, plan: one small algebra behind recovery, resharding, checkpoints and sub-models.

Pure Python and numpy: nothing here moves a byte, opens a file or knows a process group.
"""

from resilin.layout.boxes import Boxes
from resilin.layout.census import Count, check, count, gaps
from resilin.layout.cuts import Cut, Deal, Flat, Only, Part, Shard, Window
from resilin.layout.errors import LayoutError
from resilin.layout.holdings import Holdings
from resilin.layout.layout import Holding, Layout, merge, named
from resilin.layout.mesh import Mesh
from resilin.layout.moves import Move, Plan, Span, TensorMoves
from resilin.layout.place import Place, file, host, rank
from resilin.layout.plan import plan
from resilin.layout.region import Region, flat_range, missing, row_major, tiles
from resilin.layout.spec import ParamSpec, SpecRule, flat_group, layout_of, specs_of, staged

__all__ = [
    "Boxes",
    "Count",
    "Cut",
    "Deal",
    "Flat",
    "Holding",
    "Holdings",
    "Layout",
    "LayoutError",
    "Mesh",
    "Move",
    "Only",
    "ParamSpec",
    "Part",
    "Place",
    "Plan",
    "Region",
    "Shard",
    "Span",
    "SpecRule",
    "TensorMoves",
    "Window",
    "check",
    "count",
    "file",
    "flat_group",
    "flat_range",
    "gaps",
    "host",
    "layout_of",
    "merge",
    "missing",
    "named",
    "plan",
    "rank",
    "row_major",
    "specs_of",
    "staged",
    "tiles",
]
