"""Grids keep the field of view when they become coarser; boxes and clips stay inside."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from resilin.vision.grid import (
    Box,
    Grid,
    centre_box,
    crop_box,
    frame_indices,
    jitter_range,
    pick,
    spread_box,
    stride_range,
)

uniform = st.floats(0, 1, exclude_max=True)


@given(low=st.integers(-5, 5), more=st.integers(0, 9), u=uniform)
def test_pick_stays_in_its_range(low: int, more: int, u: float) -> None:
    assert low <= pick(u, low, low + more) <= low + more


def test_pick_reaches_every_number_equally_often() -> None:
    drawn = [pick(k / 1000, 3, 7) for k in range(1000)]
    assert [drawn.count(n) for n in range(3, 8)] == [200] * 5


def test_the_jitter_range_of_the_paper() -> None:
    assert jitter_range(256, 320, 224, 224) == (256, 320)
    assert jitter_range(256, 320, 158, 224) == (181, 320)
    assert jitter_range(256, 320, 112, 224) == (128, 320)


@given(
    height=st.integers(8, 60), width=st.integers(8, 60), size=st.integers(1, 40), scale=st.integers(1, 80), u=uniform
)
def test_a_box_lies_in_the_picture(height: int, width: int, size: int, scale: int, u: float) -> None:
    for box in (crop_box(height, width, size, scale, u, 1 - u if u else 0.0), centre_box(height, width, size, scale)):
        assert box.side >= 1
        assert box.top >= 0
        assert box.left >= 0
        assert box.top + box.side <= height
        assert box.left + box.side <= width


@given(height=st.integers(8, 60), width=st.integers(8, 60), size=st.integers(1, 8), count=st.integers(1, 5))
def test_validation_crops_reach_both_ends_of_the_longer_side(height: int, width: int, size: int, count: int) -> None:
    boxes = [spread_box(height, width, size, 8, number, count) for number in range(count)]
    assert spread_box(height, width, size, 8, 0, 1) == centre_box(height, width, size, 8)
    assert all(0 <= b.top <= height - b.side and 0 <= b.left <= width - b.side for b in boxes)
    if count > 1:
        ends = [(b.left, width - b.side) if width >= height else (b.top, height - b.side) for b in boxes]
        assert (ends[0][0], ends[-1][0]) == (0, ends[-1][1])
        steps = [b[0] - a[0] for a, b in itertools.pairwise(ends)]
        assert max(steps) - min(steps) <= 1


def test_the_left_middle_and_right_crop_of_a_wide_picture() -> None:
    assert [spread_box(256, 340, 224, 256, n, 3) for n in range(3)] == [
        Box(16, 0, 224), Box(16, 58, 224), Box(16, 116, 224)
    ]  # fmt: skip


def test_samples_are_called_by_their_axes() -> None:
    assert [g.kind for g in (Grid(8, 32), Grid(size=32), Grid(frames=8))] == ["clips", "images", "series"]


def test_full_size_is_the_identity_grid() -> None:
    assert (crop_box(32, 32, 32, 32, 0.7, 0.2).side, crop_box(32, 32, 32, 32, 0.7, 0.2).top) == (32, 0)
    assert frame_indices(8, 8, 1, 0.9) == list(range(8))


def test_a_coarse_crop_may_show_the_whole_field_of_view() -> None:
    low, _ = jitter_range(32, 40, 16, 32)
    assert crop_box(32, 32, 16, low, 0.0, 0.0).side == 32


@given(full=st.sampled_from([8, 16, 32]), divisor=st.sampled_from([1, 2, 4]), stride=st.integers(1, 3))
def test_the_largest_stride_spans_the_frames_of_the_full_clip(full: int, divisor: int, stride: int) -> None:
    frames = full // divisor
    low, high = stride_range(stride, frames, full)
    assert (low, high) == (stride, stride * divisor)
    length = full * stride
    fine, coarse = frame_indices(length, full, stride, 0.0), frame_indices(length, frames, high, 0.0)
    assert coarse[0] == fine[0]
    assert 0 <= fine[-1] - coarse[-1] < high


@given(length=st.integers(1, 40), frames=st.integers(1, 20), stride=st.integers(1, 5), u=uniform)
def test_clips_stay_in_the_video_and_never_go_back(length: int, frames: int, stride: int, u: float) -> None:
    indices = frame_indices(length, frames, stride, u)
    assert len(indices) == frames
    assert indices[0] >= 0
    assert indices[-1] < length
    gaps = {b - a for a, b in itertools.pairwise(indices)}
    if frames <= length:
        assert len(gaps) <= 1, "evenly spaced"
    assert all(gap >= 0 for gap in gaps)
