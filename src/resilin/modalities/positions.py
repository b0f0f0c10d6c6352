"""Uni-RoPE: one space of positions (time, height, width) for all kinds of tokens (ERNIE 5.0, section 3).

Text and sound have time = height = width = their number, which is ordinary RoPE. A picture that begins at p has the
time p + its frame, and heights and widths around p that share one centre at every scale: cell i of n of a side lies at
p + ((i + 1/2) / n - 1/2) * (cells of the finest scale). Corners of a coarse cell and of the fine ones it covers agree.

What follows a picture goes on at p + the largest of frames, height and width of the finest grid (our choice, as in
other models with three coordinates: nobody behind it shares a position with it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from resilin.modalities.shape import PictureShape


def text_positions(count: int, at: float) -> Tensor:
    """(count, 3) float32 of tokens in a line.

    Args:
        count: of tokens.
        at: the first one's position.
    """
    return (torch.arange(count, dtype=torch.float32) + at)[:, None].expand(count, 3)


def _centred(cells: int, extent: int, at: float) -> Tensor:
    return at + ((torch.arange(cells, dtype=torch.float32) + 0.5) / cells - 0.5) * extent


def picture_positions(shape: PictureShape, at: float, frame: int) -> Tensor:
    """(places, 3) float32 of a picture's tokens, scale by scale and row by row.

    Args:
        shape: of the picture.
        at: where it (or its video) begins.
        frame: its number in its video.
    """
    extent_h, extent_w = shape.finest
    parts = []
    for height, width in shape.grids:
        y_H, x_W = _centred(height, extent_h, at), _centred(width, extent_w, at)
        y_N, x_N = (grid.flatten() for grid in torch.meshgrid(y_H, x_W, indexing="ij"))
        parts.append(torch.stack((torch.full_like(y_N, at + frame), y_N, x_N), -1))
    return torch.cat(parts)
