"""Who sees whom in a row of groups, as a picture (SVG)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resilin.modalities.sequence import PICTURE, SOUND
from resilin.models.groups import Groups, ends_of, frame_gaps
from resilin.models.mask_rule import MaskRule

_CELL, _EDGE = 7, 78
_COLOURS = {0: "#4878a8", PICTURE: "#c8782a", SOUND: "#4a9a5a"}
_NAMES = {0: "text", PICTURE: "picture", SOUND: "sound"}


def attention_svg(row: Mapping[str, Tensor], frame_window: int | None = None) -> str:
    """A square for each query (down) that sees a key (across), in the colour of the query's kind.

    Args:
        row: the fields of `resilin.modalities.sequence.row_of`.
        frame_window: see `resilin.modalities.objective.NextGroup`.
    """
    groups_BT, frames_BT = row["groups"][None], row["frames"][None]
    gap = None if frame_window is None else frame_gaps(frames_BT, row["videos"][None], frame_window)
    tokens, modality = len(row["groups"]), row["modality"].tolist()
    rule = MaskRule(tokens, documents_BT=row["documents"][None], groups=Groups(ends_of(groups_BT), gap))
    place = torch.arange(tokens)
    seen = rule.seen(place, place)[0].tolist()
    side = tokens * _CELL
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{side + _EDGE + 8}" height="{side + 34}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{side + _EDGE + 8}" height="{side + 34}" fill="#ffffff"/>',
        f'<text x="{_EDGE}" y="14">seen</text><text x="4" y="14">sees</text>',
    ]
    for q in range(tokens):
        for k in range(tokens):
            if seen[q][k]:
                x, y, colour = _EDGE + k * _CELL, 22 + q * _CELL, _COLOURS[modality[q]]
                lines.append(f'<rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}" fill="{colour}"/>')
    marks = _marks(modality, row["groups"].tolist())
    for first, words in marks:
        y = 22 + first * _CELL
        lines.append(f'<text x="4" y="{y + 8}">{words}</text>')
        lines.append(f'<path d="M{_EDGE - 4} {y - 0.5}h{side + 4}" stroke="#bbbbbb" stroke-width="0.5"/>')
    return "\n".join([*lines, "</svg>", ""])


def _marks(modality: list[int], groups: list[int]) -> list[tuple[int, str]]:
    """Where a stretch of one kind, or a scale, begins, and its name."""
    found: list[tuple[int, str]] = []
    scale = 0
    for place, kind in enumerate(modality):
        new = place == 0 or modality[place - 1] != kind
        if kind == PICTURE and (new or groups[place - 1] != groups[place]):
            scale = 0 if new else scale + 1
            found.append((place, f"scale {scale}"))
        elif new and kind != PICTURE:
            found.append((place, _NAMES[kind]))
    return found
