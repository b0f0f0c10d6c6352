"""The source of labelled video clips.

Legend: N samples, C channels, T frames, S height and width of the crop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from resilin.data.errors import DataError, Problem
from resilin.data.settings import SourceContext
from resilin.vision.augment import Normal, Views, cut
from resilin.vision.decode import decode_video
from resilin.vision.files import Entry, OnError, class_folders, number_classes, read_list, settle
from resilin.vision.grid import Box, Grid, frame_indices, pick, stride_range
from resilin.vision.labelled import LabelledSettings, LabelledSource

ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".mpg", ".mpeg", ".m4v")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Frames `start` to `stop` of a file, or a part of each: `box` is top, left, bottom, right."""

    pixels_THWC: NDArray[np.uint8]
    start: int
    stop: int
    box: tuple[int, int, int, int]
    reverse: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its frames."""
        top, left, bottom, right = self.box
        return bottom - top, right - left

    def frames(self, indices: Sequence[int], part: Box) -> Tensor:
        """(T, side, side, C) uint8: a part of some frames, counted from the first one as it is played."""
        places = [self.stop - 1 - i if self.reverse else self.start + i for i in indices]
        top, left = self.box[0] + part.top, self.box[1] + part.left
        # Only what is shown is read from the file: a crop may be a small part of a large picture.
        shown = self.pixels_THWC[:, top : top + part.side, left : left + part.side]
        return torch.from_numpy(shown[places])


class Clips:
    """Clips of stretches of video: see `resilin.vision.labelled.Samples`."""

    def __init__(
        self,
        stretches: Sequence[Stretch],
        labels: Sequence[str | int],
        digest: str,
        settings: Videos,
    ) -> None:
        self.stretches = stretches
        self.classes, numbers = number_classes(labels)
        self.labels_N = np.array(numbers, np.int64)
        self.digest, self.settings = digest, settings

    @property
    def fixed_views(self) -> int:
        """Clips times crops: see `resilin.vision.labelled.Samples`."""
        return self.settings.validation_clips * self.settings.views.validation_crops

    def view(self, index: int, grid: Grid, full: Grid, u: list[float] | None, number: int | None = None) -> Tensor:
        """(C, T, S, S); see `resilin.vision.labelled.Samples`."""
        stretch, settings = self.stretches[index], self.settings
        length = stretch.stop - stretch.start
        low, high = stride_range(settings.stride, grid.frames, full.frames)
        clip, crop = (None, None) if number is None else divmod(number, settings.views.validation_crops)
        if u is None:
            place = 0.5 if clip is None else (clip + 0.5) / settings.validation_clips
            indices = frame_indices(length, grid.frames, low, place)
        else:
            # One number serves both the stride and the start: what is left of it after the stride is uniform again.
            scaled = u[7] * (high - low + 1)
            indices = frame_indices(length, grid.frames, pick(u[7], low, high), scaled - int(scaled))
        height, width = stretch.size
        if u is None:
            box = settings.views.validation_box(height, width, grid, full, crop)
        else:
            box = settings.views.training_box(height, width, grid, full, u)
        view_CTHW = cut(stretch.frames(indices, box), grid.size)
        return view_CTHW if u is None else settings.views.training_view(view_CTHW, u)

    def batch(self, views: Sequence[Tensor]) -> Tensor:
        """(B, C, T, S, S) float32."""
        return self.settings.normal(torch.stack(tuple(views)))


class Videos(LabelledSettings):
    """Clips of video files: a folder for each class, or a JSONL list of stretches.

    A line of the list: `{"file": "a.mp4", "label": "run", "start": 1.5, "end": 4.0}` (seconds), and, if wanted,
    `"box": [left, top, right, bottom]` in fractions of the frame and `"reverse": true`.
    """

    path: Path
    """The folder of class folders, or the list."""
    validation_path: Path | None = None
    """The same for validation, instead of `held_out`."""
    frames: Annotated[int, Field(ge=1)]
    """Frames of a clip (T)."""
    size: Annotated[int, Field(ge=1)]
    """Height and width of the crop (S)."""
    stride: Annotated[int, Field(ge=1)] = 1
    """Frames of the file between two of the clip (r)."""
    validation_clips: Annotated[int, Field(ge=1)] = 1
    """Clips of each stretch to validate on, spread evenly; predictions are averaged, over `views.validation_crops` too
    (the test of Feichtenhofer et al., 2019, takes 10 clips and 3 crops)."""
    kept_side: Annotated[int, Field(ge=0)] | None = None
    """Decoded frames are kept with this short side at most; 0: as they are; left out: the largest that `views.scale`
    asks for, or `size`."""
    views: Views = Views()
    """How training views are drawn."""
    normal: Normal = Normal()
    """How pixel values are shifted and scaled."""
    on_error: OnError = "stop"
    """Stop at the first file that cannot be decoded, or leave such files out and count them."""
    cache: Path = Path(".cache/resilin")
    """Where decoded frames are kept, as they are: about T x H x W x 3 bytes a file."""

    @model_validator(mode="after")
    def _crop_fits(self) -> Videos:
        if self.views.scale is not None and self.views.scale[0] < self.size:
            raise ValueError(
                f"views.scale begins at {self.views.scale[0]}, below the crop's size ({self.size}): a crop cannot be "
                "larger than the picture"
            )
        return self

    @property
    def decoded_side(self) -> int:
        """The short side that frames are kept at; 0: as they are."""
        if self.kept_side is not None:
            return self.kept_side
        return self.views.scale[1] if self.views.scale is not None else self.size

    def entries(self, path: Path) -> tuple[list[Entry], Path]:
        """The stretches that a folder or a list names, and where their files are relative to."""
        if path.is_dir():
            files = class_folders(path, ENDINGS)
            return [Entry(file=f.path.relative_to(path).as_posix(), label=f.label) for f in files], path
        return read_list(path), path.parent

    def build(self, context: SourceContext) -> LabelledSource:
        """The source of one split; files are decoded on the first use.

        Raises:
            DataError: naming a file, folder or line that cannot be used.
        """
        separate = self.validation_path is not None
        samples = self.clips(self.path)
        if separate and context.split == "validation":
            assert self.validation_path is not None
            shown = self.clips(self.validation_path)
            if shown.classes != samples.classes:
                raise DataError(
                    f"{self.validation_path}: its classes ({', '.join(shown.classes)}) are not those of {self.path} "
                    f"({', '.join(samples.classes)})"
                )
            samples = shown
        grid = Grid(self.frames, self.size)
        return self.source(samples, grid, context, split_known=separate)

    def clips(self, path: Path) -> Clips:
        """The clips of a folder or list."""
        entries, root = self.entries(path)
        stretches, labels, kept, problems = [], [], [], []
        for number, entry in enumerate(entries, start=1):
            try:
                stretches.append(self._stretch(root / entry.file, entry))
            except DataError as error:
                where, _, what = str(error).partition(": ")
                problems.append(Problem("unusable", f"{where} (entry {number})", what))
                continue
            labels.append(entry.label)
            kept.append(entry.model_dump(mode="json") | {"bytes": (root / entry.file).stat().st_size})
        settle(problems, len(entries), self.on_error, "videos")
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        return Clips(stretches, labels, digest, self)

    def _stretch(self, path: Path, entry: Entry) -> Stretch:
        decoded = decode_video(path, self.decoded_side, self.cache)
        count, height, width, _ = decoded.pixels_THWC.shape
        start = round(entry.start * decoded.rate)
        stop = count if entry.end is None else min(count, round(entry.end * decoded.rate))
        if stop <= start:
            raise DataError(
                f"{path}: {entry.start:g} s to {entry.end if entry.end is not None else 'its end'} holds no frame; "
                f"the file has {count} frames, {count / decoded.rate:.2f} s"
            )
        left, top, right, bottom = entry.box or (0.0, 0.0, 1.0, 1.0)
        box = (int(top * height), int(left * width), int(bottom * height), int(right * width))
        if box[2] <= box[0] or box[3] <= box[1]:
            raise DataError(f"{path}: the box {list(entry.box or ())} holds no pixel of {height} x {width}")
        # As a plain array: a memory-mapped one takes 10 microseconds more each time it is indexed.
        return Stretch(decoded.pixels_THWC.view(np.ndarray), start, stop, box, entry.reverse)
