"""Where samples are taken: how many frames, which crop, from which part of a picture.

The rules are those of multigrid training (Wu et al., "A multigrid method for efficiently training video models",
CVPR 2020, section 3.1): fewer frames are further apart and a smaller crop may show the same field of view.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grid:
    """The shape of a sample; an axis that the data do not have is 0.

    Attributes:
        frames: T: frames of a clip, points of a series, tokens of a row.
        size: S: height and width of the crop.
    """

    frames: int = 0
    size: int = 0

    @property
    def cost(self) -> int:
        """T * S^2: what a sample of this shape costs, up to a factor."""
        return (self.frames or 1) * (self.size or 1) ** 2

    @property
    def kind(self) -> str:
        """What samples of this shape are called."""
        return ("clips" if self.frames else "images") if self.size else "series"

    def __str__(self) -> str:
        parts = [str(self.frames)] if self.frames else []
        return " x ".join(parts + [str(self.size)] * (2 if self.size else 0)) or "as it is"


@dataclass(frozen=True, slots=True)
class Box:
    """A square of a picture, in pixels."""

    top: int
    left: int
    side: int

    @property
    def rows(self) -> slice:
        """From top to bottom."""
        return slice(self.top, self.top + self.side)

    @property
    def columns(self) -> slice:
        """From left to right."""
        return slice(self.left, self.left + self.side)


def pick(u: float, low: int, high: int) -> int:
    """The integer of [low, high] that a uniform number of [0, 1) falls on."""
    return low + min(int(u * (high - low + 1)), high - low)


def jitter_range(low: int, high: int, size: int, full_size: int) -> tuple[int, int]:
    """The range of the scaled short side for a crop of `size`, given that for a crop of `full_size`.

    The minimum shrinks with the crop, so that some crops keep the field of view; the maximum stays, so that others
    show a part at full resolution.
    """
    return round(low * size / full_size), high


def crop_box(height: int, width: int, size: int, scaled_short: int, u_top: float, u_left: float) -> Box:
    """The part of a picture that becomes a crop of `size` once its short side is scaled to `scaled_short`.

    Args:
        height: of the picture.
        width: of the picture.
        size: of the crop, at most `scaled_short` (a larger one takes the whole short side).
        scaled_short: the short side after scaling.
        u_top: uniform in [0, 1), where the crop lies.
        u_left: the same, across.
    """
    short = min(height, width)
    side = max(1, min(short, round(size * short / scaled_short)))
    return Box(pick(u_top, 0, height - side), pick(u_left, 0, width - side), side)


def centre_box(height: int, width: int, size: int, scaled_short: int) -> Box:
    """The middle crop of the same scale."""
    short = min(height, width)
    side = max(1, min(short, round(size * short / scaled_short)))
    return Box((height - side) // 2, (width - side) // 2, side)


def spread_box(height: int, width: int, size: int, scaled_short: int, number: int, count: int) -> Box:
    """The `number`-th of `count` crops of one scale, spread from end to end of the longer side; of one: the middle.

    Three of them are the left, middle and right crop of a wide picture (Feichtenhofer et al., 2019).
    """
    middle = centre_box(height, width, size, scaled_short)
    if count == 1:
        return middle
    if width >= height:
        return Box(middle.top, round((width - middle.side) * number / (count - 1)), middle.side)
    return Box(round((height - middle.side) * number / (count - 1)), middle.left, middle.side)


def stride_range(stride: int, frames: int, full_frames: int) -> tuple[int, int]:
    """The strides a clip of `frames` is drawn from: from that of the full clip to one that keeps its span."""
    return stride, stride * max(1, full_frames // frames)


def frame_indices(length: int, frames: int, stride: int, u: float) -> list[int]:
    """The frames of a clip.

    Args:
        length: frames there are, at least 1.
        frames: frames to take.
        stride: distance between them; made smaller where the video is too short for it.
        u: uniform in [0, 1): where the clip begins; 0.5 is the middle.

    Returns:
        `frames` increasing indices below `length`; a video with fewer frames than that repeats its last one.
    """
    if frames > 1 and (frames - 1) * stride >= length:
        stride = max(1, (length - 1) // (frames - 1))
    span = (frames - 1) * stride + 1
    start = pick(u, 0, max(0, length - span))
    return [min(start + k * stride, length - 1) for k in range(frames)]
