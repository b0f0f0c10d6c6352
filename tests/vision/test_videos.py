"""Video sources: frames as encoded, clips by key, lists with stretches, bad files named; the packaged clips decode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resilin.config import SettingsError, parse_settings
from resilin.data.errors import DataError
from resilin.data.settings import SourceContext
from resilin.vision.decode import decode_video
from resilin.vision.grid import Grid
from resilin.vision.videos import Videos

Maker = Callable[..., np.ndarray]
TRAIN = SourceContext(1, "train", 4)


def listed(tmp: Path, entries: list[dict[str, Any]], **more: Any) -> Videos:
    path = tmp / "list.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    tree = {"path": path, "frames": 4, "size": 16, "cache": tmp / "cache", "kept_side": 0, "held_out": {"fraction": 0}}
    return parse_settings(Videos, {**tree, **more}, "test")


def test_frames_come_out_of_the_cache_as_they_were_encoded(tmp_path: Path, make_video: Maker) -> None:
    shown = make_video(tmp_path / "a.mp4")
    for _ in range(2):
        decoded = decode_video(tmp_path / "a.mp4", 0, tmp_path / "cache")
        assert decoded.pixels_THWC.shape == shown.shape
        assert np.abs(decoded.pixels_THWC.astype(int) - shown).max() <= 1
        assert decoded.rate == 10.0
        assert isinstance(decoded.pixels_THWC, np.memmap)
    assert len(list((tmp_path / "cache").iterdir())) == 2, "nothing half-written is left"
    assert decode_video(tmp_path / "a.mp4", 16, tmp_path / "cache").pixels_THWC.shape[1:3] == (16, 24)


def test_a_list_gives_stretches_boxes_and_reversed_play(tmp_path: Path, make_video: Maker) -> None:
    shown = make_video(tmp_path / "a.mp4").astype(np.float32) / 255
    entries = [
        {"file": "a.mp4", "label": "whole"},
        {"file": "a.mp4", "label": "part", "start": 0.5, "end": 0.9},
        {"file": "a.mp4", "label": "back", "start": 0.5, "end": 0.9, "reverse": True},
        {"file": "a.mp4", "label": "left", "start": 0.5, "end": 0.9, "box": [0.0, 0.0, 0.5, 0.5]},
    ]
    normal = {"mean": [0.0], "std": [1.0]}
    settings = listed(tmp_path, entries, augment=False, shuffle=False, normal=normal)
    source = settings.build(TRAIN)
    assert source.classes == ("back", "left", "part", "whole")
    batch = source.resampled(Grid(4, 32)).fetch(0, range(4))
    assert batch["labels"].tolist() == [3, 2, 0, 1]
    assert batch["inputs"].shape == (4, 3, 4, 32, 32)
    part = batch["inputs"][1].permute(1, 2, 3, 0)
    assert torch.allclose(part, torch.from_numpy(shown[5:9, :, 8:40]), atol=0.01)
    assert torch.equal(batch["inputs"][2], batch["inputs"][1].flip(1))
    means = batch["inputs"][0].mean((0, 2, 3))
    assert (means.diff() > 0).all(), "frames are in order"


def test_fewer_frames_keep_the_span(tmp_path: Path, make_video: Maker) -> None:
    make_video(tmp_path / "a.mp4")
    source = listed(tmp_path, [{"file": "a.mp4", "label": 0}], frames=8, epochs=None).build(TRAIN)
    spans = set()
    for step in range(60):
        clip = source.resampled(Grid(2, 8)).fetch(step, [0])["inputs"][0]
        brightness = clip.mean((0, 2, 3)) * 0.225 * 255
        spans.add(round(float(brightness[1] - brightness[0]) / 5))
    assert spans == {1, 2, 3, 4}


def test_clips_depend_on_seed_step_and_slot_alone(tmp_path: Path, make_video: Maker) -> None:
    make_video(tmp_path / "a.mp4")
    views = {"scale": [16, 24], "contrast": 0.2}
    settings = listed(tmp_path, [{"file": "a.mp4", "label": n} for n in range(6)], views=views)
    whole = settings.build(TRAIN).fetch(1, range(4))["inputs"]
    assert torch.equal(settings.build(TRAIN).fetch(1, [2, 1])["inputs"], whole[[2, 1]])
    assert not torch.equal(settings.build(SourceContext(2, "train", 4)).fetch(1, range(4))["inputs"], whole)


def test_validation_shows_clips_from_begin_to_end_and_crops_from_side_to_side(
    tmp_path: Path, make_video: Maker
) -> None:
    shown = make_video(tmp_path / "a.mp4").astype(np.float32) / 255
    entries = [{"file": "a.mp4", "label": n % 2} for n in range(4)]
    views = {"scale": [32, 32], "validation_crops": 3}
    more = {"size": 32, "normal": {"mean": [0.0], "std": [1.0]}, "held_out": {"fraction": 0.5}}
    settings = listed(tmp_path, entries, validation_clips=2, views=views, **more)
    held = settings.build(SourceContext(1, "validation", 2))
    views_BV = held.fetch(0, range(2))["views"]
    assert views_BV.shape == (2, 6, 3, 4, 32, 32)
    assert len(held) == 1
    # 20 frames of 32 x 48: clips of 4 begin at 1/4 and 3/4 of 0 to 16, crops at 0, 8 and 16.
    for number, (start, left) in enumerate((s, x) for s in (4, 12) for x in (0, 8, 16)):
        wanted = torch.from_numpy(shown[start : start + 4, :, left : left + 32]).permute(3, 0, 1, 2)
        assert torch.allclose(views_BV[0, number], wanted, atol=0.01)
    train = settings.build(TRAIN)
    assert train.fetch(0, [0])["inputs"].shape == (1, 3, 4, 32, 32), "training sees one view, drawn by key"
    fixed = settings.model_copy(update={"augment": False}).build(TRAIN)
    middle = torch.from_numpy(shown[8:12, :, 8:40]).permute(3, 0, 1, 2)
    assert torch.allclose(fixed.fetch(0, [0])["inputs"][0], middle, atol=0.01)


def test_slots_of_several_steps_at_once_are_those_of_each(tmp_path: Path, make_video: Maker) -> None:
    make_video(tmp_path / "a.mp4")
    views = {"scale": [16, 24], "contrast": 0.2}
    source = listed(tmp_path, [{"file": "a.mp4", "label": n} for n in range(6)], views=views).build(TRAIN)
    both = source.fetch_steps([(5, [2, 0]), (7, range(4))])
    for name in ("inputs", "labels"):
        wanted = torch.cat([source.fetch(5, [2, 0])[name], source.fetch(7, range(4))[name]])
        assert torch.equal(both[name], wanted)


def test_class_folders(tmp_path: Path, make_video: Maker) -> None:
    for name in ("run", "walk"):
        (tmp_path / "v" / name).mkdir(parents=True)
        make_video(tmp_path / "v" / name / "a.mp4", frames=6)
    tree = {"path": tmp_path / "v", "frames": 4, "size": 16, "cache": tmp_path / "c", "held_out": {"fraction": 0}}
    source = Videos.model_validate(tree).build(TRAIN)
    assert source.classes == ("run", "walk")
    assert source.fetch(0, range(2))["inputs"].shape == (2, 3, 4, 16, 16)


def test_broken_videos_are_named_or_left_out_and_counted(
    tmp_path: Path, make_video: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    make_video(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:300])
    entries = [
        {"file": "a.mp4", "label": 0},
        {"file": "b.mp4", "label": 1},
        {"file": "none.mp4", "label": 1},
        {"file": "a.mp4", "label": 1, "start": 50.0},
    ]
    with pytest.raises(DataError, match=r"b\.mp4 \(entry 2\): cannot be decoded.*2 more like it.*on_error"):
        listed(tmp_path, entries).build(TRAIN)
    source = listed(tmp_path, entries, on_error="skip").build(TRAIN)
    assert len(source.samples.labels_N) == 1
    assert "3 of 4 videos left out (3 unusable)" in capsys.readouterr().err
    assert not list((tmp_path / "cache").glob("*.raw")), "what a broken file left is removed"
    with pytest.raises(DataError, match="none of 1 videos can be used"):
        listed(tmp_path, entries[1:2], on_error="skip").build(TRAIN)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ('{"label": 1}', "file: Field required"),
        ('{"file": "a", "label": 1, "start": 2, "end": 1}', "is not after start"),
        ('{"file": "a", "label": 1, "box": [0, 0, 0, 1]}', "should be .left, top, right, bottom."),
        ("", "holds no entry"),
    ],
)
def test_bad_lists_are_refused_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        Videos.model_validate({"path": path, "frames": 2, "size": 8, "cache": tmp_path}).build(TRAIN)


def test_a_crop_larger_than_the_picture_is_refused() -> None:
    with pytest.raises(SettingsError, match="cannot be larger than the picture"):
        parse_settings(Videos, {"path": "x", "frames": 2, "size": 32, "views": {"scale": [16, 40]}}, "test")


def test_real_clips_of_a_package_decode(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from resilin.recipes.multigrid import VIDEOS, packaged_videos

    decoded = decode_video(packaged_videos() / "carphone_pristine.mp4", 36, tmp_path)
    rate, count = VIDEOS["carphone_pristine"]
    assert decoded.pixels_THWC.shape == (count, 36, 44, 3)
    assert decoded.rate == pytest.approx(rate)
    assert decoded.pixels_THWC.std() > 20
