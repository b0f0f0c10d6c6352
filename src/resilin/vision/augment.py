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
from resilin.vision.grid import Box, Grid, crop_box, jitter_range, pick, spread_box

DRAWS = 8
"""Uniform numbers of a view: scale, top, left, flip, brightness, contrast, saturation, and one for time."""

Strength = Annotated[float, Field(ge=0, lt=1)]


class Views(Settings):
    """How a training view is drawn; validation takes fixed crops, unchanged."""

    scale: tuple[int, int] | None = None
    """The short side is scaled to a size drawn uniformly from these two before the crop is taken, for instance
    (256, 320) for a crop of 224; left out: no jitter, the crop is as large as the short side."""
    validation_scale: int | None = Field(default=None, gt=0)
    """The short side for validation; left out, the smaller value of `scale`."""
    validation_crops: int = Field(default=1, ge=1)
    """Crops to validate on, spread along the longer side (1: the middle); predictions are averaged over them."""
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

    def validation_box(self, height: int, width: int, grid: Grid, full: Grid, number: int | None = None) -> Box:
        """The part of a picture that validation shows: the `number`-th crop; None: the middle."""
        scaled = self.validation_scale or (self.scale[0] if self.scale else full.size)
        which = (0, 1) if number is None else (number, self.validation_crops)
        return spread_box(height, width, grid.size, round(scaled * grid.size / full.size), *which)

    @property
    def coloured(self) -> bool:
        """Whether training views have their colours changed."""
        return bool(self.brightness or self.contrast or self.saturation)

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
        return x_C.clamp(0, 1) if self.coloured else x_C

    def training_view(self, view_C: Tensor, u: list[float]) -> Tensor:
        """A cut view (uint8, channels first), mirrored and coloured by chance.

        Returns:
            uint8, or float32 in [0, 1] where colours were changed.
        """
        if self.flip and u[3] < 0.5:
            view_C = view_C.flip(-1)
        return self.colour(view_C.float() / 255, u) if self.coloured else view_C


def cut(part_THWC: Tensor, size: int) -> Tensor:
    """A square part of each frame, scaled to `size` pixels a side.

    Args:
        part_THWC: uint8; where it has `size` pixels a side already, nothing is resampled.
        size: of the result.

    Returns:
        (C, T, size, size) uint8.
    """
    part_TCHW = part_THWC.permute(0, 3, 1, 2)
    if part_THWC.shape[1] == size:
        return part_TCHW.transpose(0, 1)
    # Antialiased: a coarse crop should hold what a camera of that resolution would have seen. Channels stay last in
    # memory, as they were decoded: half the time of rearranging them first.
    scaled = F.interpolate(part_TCHW, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return scaled.transpose(0, 1)


class Normal(Settings):
    """(x / 255 - mean) / std, for each channel alike unless as many values are given as there are channels."""

    mean: tuple[float, ...] = Field(default=(0.45,), min_length=1)
    std: tuple[float, ...] = Field(default=(0.225,), min_length=1)

    def __call__(self, views_BC: Tensor) -> Tensor:
        """Of views stacked in a batch, channels second: uint8, or float32 in [0, 1]."""
        shape = (-1, *[1] * (views_BC.ndim - 2))
        x_BC = views_BC.float().div_(255) if views_BC.dtype == torch.uint8 else views_BC.clone()
        # In place: whole batches are large, and memory is what this costs.
        return x_BC.sub_(torch.tensor(self.mean).view(shape)).div_(torch.tensor(self.std).view(shape))
