"""Random views of a sample as pure functions of uniform numbers, which a source draws from its keys.

Legend: C channels, T frames, H height, W width.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from resilin.config import Settings
from resilin.vision.grid import Box, Grid, centre_box, crop_box, jitter_range, pick

DRAWS = 8
"""Uniform numbers of a view: scale, top, left, flip, brightness, contrast, saturation, and one for time."""

Strength = Annotated[float, Field(ge=0, lt=1)]


class Views(Settings):
    """How a training view is drawn; validation always takes the middle crop, unchanged."""

    scale: tuple[int, int] | None = None
    """The short side is scaled to a size drawn uniformly from these two before the crop is taken, for instance
    (256, 320) for a crop of 224; left out: no jitter, the crop is as large as the short side."""
    validation_scale: int | None = Field(default=None, gt=0)
    """The short side for validation; left out, the smaller value of `scale`."""
    flip: bool = True
    """Mirror half of the views left to right."""
    brightness: Strength = 0.0
    """Factor drawn from 1 - b to 1 + b."""
    contrast: Strength = 0.0
    """Factor around the view's mean, drawn from 1 - c to 1 + c."""
    saturation: Strength = 0.0
    """Factor around the grey picture, drawn from 1 - s to 1 + s."""

    @model_validator(mode="after")
    def _range(self) -> Views:
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale ({self.scale[0]}, {self.scale[1]}) should be two sizes, the smaller one first")
        return self

    def training_box(self, height: int, width: int, grid: Grid, full: Grid, u: list[float]) -> Box:
        """The part of a picture that a training view of `grid` shows."""
        low, high = self.scale or (full.size, full.size)
        low, high = jitter_range(low, high, grid.size, full.size) if self.scale else (grid.size, grid.size)
        return crop_box(height, width, grid.size, pick(u[0], low, high), u[1], u[2])

    def validation_box(self, height: int, width: int, grid: Grid, full: Grid) -> Box:
        """The middle of a picture."""
        scaled = self.validation_scale or (self.scale[0] if self.scale else full.size)
        return centre_box(height, width, grid.size, round(scaled * grid.size / full.size))

    def colour(self, x_C: Tensor, u: list[float]) -> Tensor:
        """Brightness, contrast and saturation of a view with values in [0, 1], channels first."""
        if self.brightness:
            x_C = x_C * (1 + self.brightness * (2 * u[4] - 1))
        if self.contrast:
            mean = x_C.mean()
            x_C = mean + (x_C - mean) * (1 + self.contrast * (2 * u[5] - 1))
        if self.saturation and x_C.shape[0] == 3:
            grey = (x_C * x_C.new_tensor((0.299, 0.587, 0.114)).view(3, *[1] * (x_C.ndim - 1))).sum(0, keepdim=True)
            x_C = grey + (x_C - grey) * (1 + self.saturation * (2 * u[6] - 1))
        return x_C.clamp(0, 1) if self.brightness or self.contrast or self.saturation else x_C


def cut(frames_THWC: Tensor, box: Box, size: int) -> Tensor:
    """A part of each frame, scaled to `size` pixels a side.

    Args:
        frames_THWC: uint8.
        box: which part.
        size: of the result; equal to the box's side, nothing is resampled.

    Returns:
        (T, C, size, size) uint8.
    """
    part = frames_THWC[:, box.top : box.top + box.side, box.left : box.left + box.side]
    part_TCHW = part.permute(0, 3, 1, 2)
    if box.side == size:
        return part_TCHW.contiguous()
    # Antialiased: a coarse crop should hold what a camera of that resolution would have seen.
    scaled: Tensor = F.interpolate(
        part_TCHW.contiguous(), size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return scaled


class Normal(Settings):
    """(x / 255 - mean) / std, for each channel alike unless as many values are given as there are channels."""

    mean: tuple[float, ...] = Field(default=(0.45,), min_length=1)
    std: tuple[float, ...] = Field(default=(0.225,), min_length=1)

    def __call__(self, x_C: Tensor) -> Tensor:
        """Of a view with values in [0, 1], channels first."""
        shape = (-1, *[1] * (x_C.ndim - 1))
        return (x_C - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)
