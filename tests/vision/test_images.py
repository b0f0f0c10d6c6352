"""Image sources: deterministic, split by class, same bytes from every format, broken files named."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resilin.config import SettingsError, parse_settings
from resilin.data.errors import DataError
from resilin.data.settings import SourceContext
from resilin.vision.grid import Grid
from resilin.vision.images import Arrays, Idx, ImageFolder
from resilin.vision.labelled import LabelledSource

TRAIN, VALIDATION = SourceContext(3, "train", 5), SourceContext(3, "validation", 5)
IDENTITY = {"normal": {"mean": [0.0], "std": [1.0]}}


def folder(path: Path, tmp: Path, **more: Any) -> ImageFolder:
    tree = {"path": path, "size": 12, "cache": tmp / "cache", "held_out": {"fraction": 1 / 3}, **more}
    return parse_settings(ImageFolder, tree, "test")


def write_idx(path: Path, array: np.ndarray, kind: int = 8) -> None:
    header = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw = header + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def digits(count: int = 30) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8)).astype(np.uint8)
    return pixels, (np.arange(count) % 3).astype(np.uint8)


def test_both_splits_hold_every_class_and_share_no_file(image_folder: Path, tmp_path: Path) -> None:
    settings = folder(image_folder, tmp_path)
    train, held = settings.build(TRAIN), settings.build(VALIDATION)
    assert train.classes == ("bird", "cat", "dog")
    assert not set(train.rows_N) & set(held.rows_N)
    assert len(train.rows_N) + len(held.rows_N) == 18
    assert np.bincount(held.samples.labels_N[held.rows_N]).tolist() == [2, 2, 2]
    other_seed = settings.build(SourceContext(99, "validation", 5))
    assert held.rows_N.tolist() == other_seed.rows_N.tolist()


def test_tail_holds_out_the_last_of_each_class(image_folder: Path, tmp_path: Path) -> None:
    held = folder(image_folder, tmp_path, held_out={"fraction": 1 / 3, "by": "tail"}).build(VALIDATION)
    assert held.rows_N.tolist() == [4, 5, 10, 11, 16, 17]


def test_a_slot_holds_the_same_whoever_asks(image_folder: Path, tmp_path: Path) -> None:
    views = {"scale": [12, 18], "brightness": 0.3, "contrast": 0.2, "saturation": 0.4}
    settings = folder(image_folder, tmp_path, views=views)
    whole = settings.build(TRAIN).fetch(2, range(5))
    again = settings.build(TRAIN)
    for slot in (3, 0):
        assert torch.equal(again.fetch(2, [slot])["inputs"][0], whole["inputs"][slot])
    assert whole["inputs"].shape == (5, 3, 12, 12)
    other = folder(image_folder, tmp_path, views=views).build(SourceContext(4, "train", 5)).fetch(2, range(5))
    assert not torch.equal(other["inputs"], whole["inputs"])


def test_an_image_by_number_looks_fixed_outside_a_step_and_as_its_slot_inside(
    image_folder: Path, tmp_path: Path
) -> None:
    views = {"scale": [12, 18], "brightness": 0.3}
    source = folder(image_folder, tmp_path, views=views).build(TRAIN)
    fixed = folder(image_folder, tmp_path, views=views, augment=False).build(TRAIN)
    assert source.pool_parts == (12,)
    whole = source.fetch(2, range(5))
    numbers = source.order.row_of(2, range(5)).tolist()
    assert torch.equal(source.read(numbers)["inputs"], fixed.fetch(2, range(5))["inputs"])
    assert not torch.equal(source.read(numbers)["inputs"], whole["inputs"])
    part = source.read_for(2, [4, 1], [numbers[4], numbers[1]])
    assert part.slots_B.tolist() == [4, 1]
    assert torch.equal(part["inputs"], whole["inputs"][[4, 1]])
    assert torch.equal(part["labels"], whole["labels"][[4, 1]])
    with pytest.raises(DataError, match="sample 12 is not in the pool"):
        source.read([12])


def test_an_epoch_reads_each_image_once(image_folder: Path, tmp_path: Path) -> None:
    source = folder(image_folder, tmp_path, epochs=1).build(TRAIN)
    rows = [row for step in range(len(source)) for row in source.order.row_of(step, range(source.slots(step)))]
    assert sorted(rows) == list(range(12))


def test_flip_mirrors_about_half_of_the_views(tmp_path: Path) -> None:
    pixels = np.tile(np.arange(8, dtype=np.uint8)[None, None] * 30, (40, 8, 1))
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.zeros(40, np.int64))
    tree = {"path": tmp_path / "x.npz", "size": 8, "held_out": {"fraction": 0.0}, **IDENTITY}
    batch = parse_settings(Arrays, tree, "test").build(SourceContext(0, "train", 40)).fetch(0, range(40))
    rising = (batch["inputs"][:, 0, 0, -1] > batch["inputs"][:, 0, 0, 0]).sum().item()
    assert 10 < rising < 30
    still = parse_settings(Arrays, {**tree, "augment": False}, "test").build(SourceContext(0, "train", 40))
    wanted = torch.from_numpy(pixels[:1]).float() / 255
    assert torch.allclose(still.fetch(0, [0])["inputs"][0], wanted)


def test_validation_shows_the_middle_without_chance(image_folder: Path, tmp_path: Path) -> None:
    first = folder(image_folder, tmp_path).build(VALIDATION)
    second = folder(image_folder, tmp_path).build(SourceContext(7, "validation", 5))
    assert torch.equal(first.fetch(0, range(5))["inputs"], second.fetch(0, range(5))["inputs"])
    assert len(first) == 2
    assert first.slots(1) == 1


def test_another_grid_shows_the_same_samples(image_folder: Path, tmp_path: Path) -> None:
    source = folder(image_folder, tmp_path, augment=False).build(TRAIN)
    coarse = source.resampled(Grid(size=6))
    assert coarse.fetch(0, range(5))["inputs"].shape == (5, 3, 6, 6)
    assert torch.equal(coarse.fetch(0, range(5))["labels"], source.fetch(0, range(5))["labels"])
    fine = source.fetch(0, range(5))["inputs"]
    pooled = torch.nn.functional.avg_pool2d(fine, 2)
    assert (coarse.fetch(0, range(5))["inputs"] - pooled).abs().mean() < 0.1 * fine.std()
    assert source.resampled(source.grid) is source


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_and_arrays_give_the_same_pixels(tmp_path: Path, ending: str) -> None:
    pixels, labels = digits()
    write_idx(tmp_path / f"images{ending}", pixels)
    write_idx(tmp_path / f"labels{ending}", labels)
    np.savez(tmp_path / "all.npz", images=pixels, labels=labels)
    np.save(tmp_path / "images.npy", pixels)
    np.save(tmp_path / "labels.npy", labels)
    common = {"size": 8, **IDENTITY}
    idx = Idx.model_validate({"images": tmp_path / f"images{ending}", "labels": tmp_path / f"labels{ending}", **common})
    npz = Arrays.model_validate({"path": tmp_path / "all.npz", **common})
    npy = Arrays.model_validate({"path": tmp_path / "images.npy", "labels_path": tmp_path / "labels.npy", **common})
    batches = [s.build(TRAIN).fetch(1, range(5)) for s in (idx, npz, npy)]
    for batch in batches[1:]:
        assert torch.equal(batch["inputs"], batches[0]["inputs"])
        assert torch.equal(batch["labels"], batches[0]["labels"])


def test_a_test_set_of_its_own_is_the_validation_split(tmp_path: Path) -> None:
    pixels, labels = digits()
    np.savez(tmp_path / "all.npz", images=pixels[:20], labels=labels[:20], ti=pixels[20:], tl=labels[20:])
    settings = Arrays.model_validate(
        {"path": tmp_path / "all.npz", "size": 8, "validation_images": "ti", "validation_labels": "tl"}
    )
    assert len(settings.build(TRAIN).rows_N) == 20
    assert len(settings.build(VALIDATION).rows_N) == 10


def test_broken_images_are_named_or_left_out_and_counted(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "cat" / "9.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"cat/9\.png: is not a readable PNG or JPEG.*on_error"):
        folder(image_folder, tmp_path).build(TRAIN)
    for _ in range(2):  # the second time what was found is read back
        source = folder(image_folder, tmp_path, on_error="skip").build(TRAIN)
        assert len(source.samples.labels_N) == 18
        assert "1 of 19 images left out (1 broken)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b"\x01\x02\x08\x03aaaa"), "is not an idx file"),
        (lambda p: p.write_bytes(b"\0\0\x08\x03"), "ends within its header"),
        (lambda p: write_idx(p, np.zeros((2, 3), np.uint8)), r"expected \(N, H, W\)"),
        (lambda p: p.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1])), "holds 1 bytes of data"),
        (lambda p: p.write_bytes(b"\x1f\x8bxxxx"), "cannot be read"),
    ],
)
def test_bad_idx_files_are_refused_by_name(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "bad-idx"
    make(path)
    settings = Idx.model_validate({"images": path, "labels": path, "size": 8})
    with pytest.raises(DataError, match=f"bad-idx.*{message}"):
        settings.build(TRAIN)


def test_bad_arrays_are_refused_and_objects_never_unpickled(tmp_path: Path) -> None:
    pixels, labels = digits()
    np.savez(tmp_path / "o.npz", images=np.array([{"a": 1}], dtype=object), labels=labels)
    np.savez(tmp_path / "f.npz", images=pixels.astype(np.float32), labels=labels)
    np.savez(tmp_path / "l.npz", images=pixels, labels=labels[:4])
    np.savez(tmp_path / "n.npz", other=pixels)
    expected = {"o": "object arrays are not read", "f": "float32", "l": r"shape \(4,\)", "n": "it holds other"}
    for name, message in expected.items():
        with pytest.raises(DataError, match=message):
            Arrays.model_validate({"path": tmp_path / f"{name}.npz", "size": 8}).build(TRAIN)


def test_empty_and_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        folder(tmp_path / "none", tmp_path).build(TRAIN)
    (tmp_path / "root" / "empty").mkdir(parents=True)
    with pytest.raises(DataError, match=r"has no file ending in \.png"):
        folder(tmp_path / "root", tmp_path).build(TRAIN)


def test_resuming_on_other_data_or_another_seed_is_refused(image_folder: Path, tmp_path: Path) -> None:
    source: LabelledSource = folder(image_folder, tmp_path).build(TRAIN)
    source.load_state_dict(source.state_dict())
    with pytest.raises(DataError, match="digest"):
        folder(image_folder, tmp_path, size=10).build(TRAIN).load_state_dict(source.state_dict())
    with pytest.raises(DataError, match="seed was 3, now it is 5"):
        folder(image_folder, tmp_path).build(SourceContext(5, "train", 5)).load_state_dict(source.state_dict())


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="smaller one first"):
        parse_settings(ImageFolder, {"path": "x", "size": 8, "views": {"scale": [9, 8]}}, "test")


def test_validation_crops_of_a_tall_picture_go_from_top_to_bottom(tmp_path: Path) -> None:
    pixels = np.arange(4 * 12 * 8, dtype=np.uint32).reshape(4, 12, 8).astype(np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(4) % 2)
    tree = {"path": tmp_path / "x.npz", "size": 8, "held_out": {"fraction": 0.5}, **IDENTITY}
    held = parse_settings(Arrays, {**tree, "views": {"validation_crops": 3}}, "test").build(VALIDATION)
    batch = held.fetch(0, range(2))
    rows = held.rows_N[held.order.row_of(0, range(2))]
    for b, row in enumerate(rows):
        for number, top in enumerate((0, 2, 4)):
            wanted = torch.from_numpy(pixels[row, None, top : top + 8].astype(np.float32)) / 255
            assert torch.equal(batch["views"][b, number], wanted)
