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
from resilin.vision.grid import Grid, frame_indices, pick, stride_range
from resilin.vision.labelled import LabelledSettings, LabelledSource

ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".mpg", ".mpeg", ".m4v")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Frames `start` to `stop` of a file, or a part of each; `clip` of `clips` for validation."""

    pixels_THWC: NDArray[np.uint8]
    start: int
    stop: int
    box: tuple[int, int, int, int]
    reverse: bool

    def frames(self, indices: Sequence[int]) -> Tensor:
        """(T, H, W, C) uint8; indices count from the stretch's first frame as it is played."""
        count = self.stop - self.start
        places = [self.stop - 1 - i if self.reverse else self.start + i for i in indices]
        top, left, bottom, right = self.box
        if count and places[0] <= places[-1] and len(set(np.diff(places))) == 1 and places[0] != places[-1]:
            step = places[1] - places[0]
            taken = self.pixels_THWC[places[0] : places[-1] + 1 : step, top:bottom, left:right]
        else:
            taken = np.stack([self.pixels_THWC[place, top:bottom, left:right] for place in places])
        return torch.from_numpy(np.array(taken))


class Clips:
    """Clips of stretches of video: see `resilin.vision.labelled.Samples`."""

    def __init__(
        self,
        stretches: Sequence[Stretch],
        labels: Sequence[str | int],
        digest: str,
        settings: Videos,
        *,
        clips: int = 1,
    ) -> None:
        self.stretches, self.clips = stretches, clips
        self.classes, numbers = number_classes(labels)
        # With several clips of each stretch, a stretch's clips are neighbours.
        self.labels_N = np.repeat(np.array(numbers, np.int64), clips)
        self.digest, self.settings = digest, settings

    def view(self, index: int, grid: Grid, full: Grid, u: list[float] | None) -> Tensor:
        """(C, T, S, S) float32."""
        stretch, settings = self.stretches[index // self.clips], self.settings
        length = stretch.stop - stretch.start
        low, high = stride_range(settings.stride, grid.frames, full.frames)
        if u is None:
            place = (index % self.clips + 0.5) / self.clips
            indices = frame_indices(length, grid.frames, low, place)
        else:
            # One number serves both the stride and the start: what is left of it after the stride is uniform again.
            scaled = u[7] * (high - low + 1)
            indices = frame_indices(length, grid.frames, pick(u[7], low, high), scaled - int(scaled))
        pixels_THWC = stretch.frames(indices)
        _, height, width, _ = pixels_THWC.shape
        views = settings.views
        if u is None:
            box = views.validation_box(height, width, grid, full)
        else:
            box = views.training_box(height, width, grid, full, u)
        x_CTHW = cut(pixels_THWC, box, grid.size).transpose(0, 1).float() / 255
        if u is not None:
            x_CTHW = views.colour(x_CTHW.flip(-1) if views.flip and u[3] < 0.5 else x_CTHW, u)
        return settings.normal(x_CTHW).contiguous()


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
    """Clips of each stretch to validate on, spread evenly; each counts as a sample."""
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
        own = separate and context.split == "validation"
        samples = self.clips(self.path, 1)
        if context.split == "validation":
            where = self.validation_path if own else self.path
            assert where is not None
            shown = self.clips(where, self.validation_clips)
            if shown.classes != samples.classes:
                raise DataError(
                    f"{where}: its classes ({', '.join(shown.classes)}) are not those of {self.path} "
                    f"({', '.join(samples.classes)})"
                )
            samples = shown
        grid = Grid(self.frames, self.size)
        return self.source(samples, grid, context, split_known=separate, repeats=samples.clips)

    def clips(self, path: Path, clips: int) -> Clips:
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
        return Clips(stretches, labels, digest, self, clips=clips)

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
        return Stretch(decoded.pixels_THWC, start, stop, box, entry.reverse)
