"""The source of labelled series: signals with one axis of time.

Legend: N samples, C channels, L points of a series, T points of a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from resilin.data.errors import DataError
from resilin.data.settings import SourceContext
from resilin.vision.arrays import labels_of, named, read_arrays
from resilin.vision.grid import Grid, frame_indices, pick, stride_range
from resilin.vision.images import class_numbers
from resilin.vision.labelled import LabelledSettings, LabelledSource


class Windows:
    """Windows of series: see `resilin.vision.labelled.Samples`."""

    def __init__(self, series_NCL: NDArray[np.float32], labels_N: NDArray[np.int64], stride: int) -> None:
        digest = hashlib.sha256(repr(series_NCL.shape).encode())
        digest.update(np.ascontiguousarray(series_NCL).data)
        digest.update(labels_N.tobytes())
        self.digest = digest.hexdigest()
        self.series_NCL, self.labels_N, self.stride = series_NCL, labels_N, stride
        self.classes = class_numbers(labels_N)

    fixed_views = 1

    def view(self, index: int, grid: Grid, full: Grid, u: list[float] | None, number: int | None = None) -> Tensor:
        """(C, T) float32."""
        length = self.series_NCL.shape[2]
        low, high = stride_range(self.stride, grid.frames, full.frames)
        if u is None:
            # A shorter validation sample spans what the full one does.
            indices = frame_indices(length, grid.frames, high, 0.5)
        else:
            scaled = u[7] * (high - low + 1)
            indices = frame_indices(length, grid.frames, pick(u[7], low, high), scaled - int(scaled))
        return torch.from_numpy(self.series_NCL[index][:, indices].copy())

    def batch(self, views: Sequence[Tensor]) -> Tensor:
        """(B, C, T) float32."""
        return torch.stack(tuple(views))


class Series(LabelledSettings):
    """Series (N, L) or (N, C, L) of floats or integers, and labels, in a .npz file."""

    path: Path
    points: Annotated[int, Field(ge=1)]
    """Points of a sample (T)."""
    stride: Annotated[int, Field(ge=1)] = 1
    """Points of the series between two of the sample."""
    series: str = "series"
    """The array of series."""
    labels: str = "labels"
    """The array of labels."""

    def build(self, context: SourceContext) -> LabelledSource:
        """The source of one split.

        Raises:
            DataError: naming the file and what is wrong with it.
        """
        arrays = read_arrays(self.path)
        array = named(arrays, self.series, self.path)
        if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "fiu":
            raise DataError(
                f"{self.path}: series have shape {array.shape} of {array.dtype}; expected numbers (N, L) or (N, C, L)"
            )
        series_NCL = np.ascontiguousarray((array if array.ndim == 3 else array[:, None]).astype(np.float32))
        if not np.isfinite(series_NCL).all():
            where = np.argwhere(~np.isfinite(series_NCL))[0].tolist()
            raise DataError(f"{self.path}: series {where[0]}, channel {where[1]}, point {where[2]} is not finite")
        labels_N = labels_of(named(arrays, self.labels, self.path), len(series_NCL), self.path)
        return self.source(Windows(series_NCL, labels_N, self.stride), Grid(frames=self.points), context)
