"""Whatever happened to the files, the message names the file and the tensor, and nothing wrong is loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.inspect import verify
from resilin.checkpoint.read import load_checkpoint
from resilin.checkpoint.verify import damages, verify_checkpoint

Make = Callable[[int], dict[str, Any]]


@pytest.fixture
def saved(folder: CheckpointFolder, state: Make) -> Path:
    folder.save(5, state(5))
    return folder.step_path(5)


def edit_index(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index as a forger would, checksum included."""
    whole = json.loads((path / "index.json").read_text())
    change(whole)
    body = json.dumps(whole["content"], separators=(",", ":"))
    whole["checksum"] = f"crc32:{zlib.crc32(body.encode()):08x}"
    (path / "index.json").write_text(json.dumps(whole))


def test_a_flipped_bit_names_file_and_tensor(saved: Path) -> None:
    file = saved / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-10] ^= 4
    file.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"optimizer.safetensors: the checksum of tensor 'moments/embed.weight/0'"
    ):
        load_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: the checksum of tensor"):
        verify(saved)
    load_checkpoint(saved, parts=["model"])
    load_checkpoint(saved, verify=False)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_single_flipped_bit_anywhere_is_found(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int, data: Any
) -> None:
    original = _a_checkpoint(tmp_path_factory)
    copy = tmp_path_factory.mktemp("flipped") / "step-00000001"
    shutil.copytree(original, copy)
    file = data.draw(st.sampled_from(sorted(copy.iterdir())))
    raw = bytearray(file.read_bytes())
    raw[int(where * len(raw))] ^= 1 << bit
    file.write_bytes(raw)
    if file.name == "index.json" and bit == 5 and raw.lower() == (original / "index.json").read_bytes().lower():
        return  # a letter's case in the JSON literals or the checksum's digits changes no meaning
    for read in (load_checkpoint, verify_checkpoint):
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
            read(copy)


_made: list[Path] = []


def _a_checkpoint(factory: pytest.TempPathFactory) -> Path:
    if not _made:
        folder = CheckpointFolder(factory.mktemp("whole"))
        folder.save(1, {"a": {"x": torch.randn(9), "y": torch.ones(2, dtype=torch.int8)}, "b": [1.5, "text", None]})
        folder.close()
        _made.append(folder.step_path(1))
    return _made[0]


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 60, 0.5, -1], ids=str)
def test_a_file_cut_short_is_named_with_its_size(folder: CheckpointFolder, saved: Path, keep: float) -> None:
    file = saved / "model.safetensors"
    data = file.read_bytes()
    count = int(len(data) * keep) if isinstance(keep, float) else keep % len(data)
    file.write_bytes(data[:count])
    match = rf"model.safetensors: has {count} bytes, but {len(data)} were written"
    with pytest.raises(CheckpointError, match=match):
        folder.load(5)
    with pytest.raises(CheckpointError, match=match):
        verify(saved)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.sampled_from(["index", "copy"]))
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_in_one_index_is_survived_by_the_other(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int, which: str
) -> None:
    folder = CheckpointFolder(tmp_path_factory.mktemp("twice"), second_copy=True)
    state = {"a": {"x": torch.arange(9.0)}, "b": [1.5, "text"]}
    folder.save(1, state)
    file = folder.step_path(1) / ("index.json" if which == "index" else "index.copy.json")
    original = file.read_bytes()
    raw = bytearray(original)
    raw[int(where * len(raw))] ^= 1 << bit
    file.write_bytes(raw)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loaded = folder.load(1)
    folder.close()
    assert torch.equal(loaded["a"]["x"], state["a"]["x"])
    assert loaded["b"] == state["b"]
    same_meaning = json_or_none(raw) == json_or_none(original)
    assert bool(warned) == (which == "index" and not same_meaning), warned
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert bool(list(damages(folder.step_path(1)))) or same_meaning


def json_or_none(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


def test_a_missing_file_is_named(folder: CheckpointFolder, saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: the file is missing"):
        folder.load(5)


def test_a_missing_index_means_never_completed(folder: CheckpointFolder, saved: Path) -> None:
    (saved / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000005: has no index.json: .* never completed"):
        folder.load(5)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "other"}', "\x00" * 50, "[" * 100_000])
def test_an_index_that_is_not_one_is_named(folder: CheckpointFolder, saved: Path, text: str) -> None:
    (saved / "index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json: is not"):
        folder.load(5)


def test_an_index_that_is_not_text_is_named(folder: CheckpointFolder, saved: Path) -> None:
    (saved / "index.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"index.json: is not valid JSON"):
        folder.load(5)


def test_a_newer_version_is_not_guessed_at(folder: CheckpointFolder, saved: Path) -> None:
    edit_index(saved, lambda whole: whole.update(version=3))
    with pytest.raises(CheckpointError, match=r"has version 3, and this Resilin reads versions 1 to 2.*update Resilin"):
        folder.load(5)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b", "..", "", "a\\b", "x\0"])
def test_an_index_cannot_lead_out_of_its_folder(folder: CheckpointFolder, saved: Path, name: str) -> None:
    def change(whole: dict[str, Any]) -> None:
        whole["content"]["files"][0]["name"] = name

    edit_index(saved, change)
    with pytest.raises(CheckpointError, match=r"not a plain name inside the checkpoint's folder"):
        folder.load(5)


def norm(content: dict[str, Any]) -> dict[str, Any]:
    return content["tensors"]["model/norm"]


def piece(content: dict[str, Any]) -> list[Any]:
    return norm(content)["pieces"][0]


def resized(content: dict[str, Any], size: int) -> None:
    norm(content)["shape"] = piece(content)[4] = [size]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("files"), r"lacks what an index must have"),
        (lambda c: c.update(tensors=[]), r"lacks what an index must have"),
        (lambda c: c.update(tree=[]), r"its tree is not a dict"),
        (lambda c: c.update(block=10), r"checksums of blocks of 10 bytes"),
        (lambda c: norm(c).update(dtype="F99"), r"tensor 'model/norm' is F99"),
        (lambda c: piece(c).__setitem__(0, 7), r"tensor 'model/norm' lies in a file that is unknown here"),
        (lambda c: piece(c).__setitem__(0, -1), r"tensor 'model/norm' lies in a file that is unknown here"),
        (lambda c: piece(c).__setitem__(0, 1), r"optimizer.safetensors: tensor 'norm' is missing"),
        (lambda c: piece(c).__setitem__(1, "nrom"), r"tensor 'nrom' is missing"),
        (lambda c: piece(c).__setitem__(2, 64), r"tensor 'norm' begins at byte \d+, but the index says 64"),
        (lambda c: piece(c).__setitem__(5, []), r"'model/norm' has 0 checksums for a piece of \[5\]"),
        (lambda c: norm(c).update(shape=[4]), r"region \[0:5\] reaches outside a tensor of shape \[4\]"),
        (lambda c: norm(c).update(shape=[6]), r"tensor 'model/norm' \[6\]: no place holds \[5:6\]"),
        (lambda c: resized(c, 6), r"tensor 'norm' is BF16 \[5\], but the index says BF16 \[6\]"),
        (lambda c: norm(c)["pieces"].clear(), r"tensor 'model/norm' \[5\]: no place holds \[0:5\]"),
        (lambda c: norm(c)["pieces"].append(piece(c)), r"'model/norm' \[5\]: declared .* 1 times.*missing or doubled"),
        (lambda c: c["tensors"].pop("model/norm"), r"its tree names tensor 'model/norm', which it does not list"),
        (lambda c: c["tree"]["model"].update(norm={"$tensor": 3}), r"unknown mark '\$tensor'"),
        (lambda c: c["tree"].update(run={"$later": 1}), r"unknown mark '\$later'.*newer version"),
        (lambda c: c["files"][0].update(bytes=3), r"model.safetensors: has \d+ bytes, but 3"),
        (lambda c: c["files"][0].pop("bytes"), r"lacks what an index must have"),
        (lambda c: c["files"].append(c["files"][0]), r"names a file twice"),
    ],
)
def test_an_index_that_contradicts_the_files_is_refused(
    folder: CheckpointFolder, saved: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_index(saved, lambda whole: change(whole["content"]))
    with pytest.raises(CheckpointError, match=message):
        folder.load(5)


def rewrite_header(file: Path, header: dict[str, Any] | bytes) -> None:
    """Another header before the same data, with the index told of it."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    new = len(raw).to_bytes(8, "little") + raw
    file.write_bytes(new + data[8 + length :])
    record = {"bytes": file.stat().st_size, "header_checksum": f"crc32:{zlib.crc32(new):08x}"}
    edit_index(file.parent, lambda whole: whole["content"]["files"][0].update(record))


ENTRY = {"dtype": "BF16", "shape": [5], "data_offsets": [0, 10]}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b"\xff\xff",
        {"norm": 3},
        {"norm": {**ENTRY, "data_offsets": [0, 1 << 60]}},
        {"norm": {**ENTRY, "data_offsets": [-10, 0]}},
        {"norm": {**ENTRY, "data_offsets": [0, 8]}},
        {"norm": {**ENTRY, "data_offsets": 10}},
        {"norm": {**ENTRY, "shape": [-5]}},
        {"norm": {**ENTRY, "shape": ["5"]}},
        {"norm": {**ENTRY, "dtype": "F99"}},
        {"norm": {}},
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused_before_memory_is_touched(saved: Path, header: Any) -> None:
    rewrite_header(saved / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=r"model.safetensors: its header cannot be read"):
        load_checkpoint(saved)


def test_a_header_longer_than_its_file_is_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[:8] = (1 << 62).to_bytes(8, "little")
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors: its header claims \d+ of \d+ bytes"):
        load_checkpoint(saved)


def test_the_latest_passes_over_what_is_not_whole_and_says_so(folder: CheckpointFolder, state: Make) -> None:
    for step in (1, 2, 3, 4):
        folder.save(step, state(step))
    (folder.step_path(4) / "index.json").unlink()
    (folder.step_path(3) / "model.safetensors").write_bytes(b"short")
    with pytest.warns(UserWarning, match=r"checkpoint of step [34] is passed over: .*step-0000000[34]") as warned:
        assert folder.latest() == 2
    assert len(warned) == 2
    assert folder.steps() == [1, 2]
    assert set(folder.damaged()) == {3, 4}


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(
    folder: CheckpointFolder, state: Make, same_bits: Callable[[Any, Any], bool]
) -> None:
    folder.save(3, state(3))
    (folder.step_path(3) / "model.safetensors").unlink()
    folder.save(3, state(3))
    assert same_bits(folder.load(3), state(3))


def test_a_damaged_checkpoint_names_the_others_there_are(folder: CheckpointFolder, saved: Path, state: Make) -> None:
    folder.save(3, state(3))
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"checksum of tensor .*other steps here: 3 \(move .*step-00000005 away to"):
        folder.load(5)


def test_an_unreadable_disk_is_named(folder: CheckpointFolder, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(DamagedError, match=r"safetensors: cannot be read at byte \d+: Input/output error"):
        folder.load(5)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES], ids=["read-only disk", "no permission"])
def test_a_folder_that_cannot_be_written_is_named_and_what_is_there_stays(
    folder: CheckpointFolder, saved: Path, state: Make, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        words = (
            rf"checkpoints: the checkpoint of step 6 could not be saved \(.*{os.strerror(number)}.*step 5 is still good"
        )
        with pytest.raises(CheckpointError, match=words):
            folder.save(6, state(6))
    assert folder.steps() == [5]


def test_an_index_of_another_run_is_told_as_such(folder: CheckpointFolder, saved: Path, state: Make) -> None:
    folder.save(9, state(9))  # the same shapes, so sizes and headers agree
    shutil.copy(folder.step_path(9) / "index.json", saved / "index.json")
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*'embed.weight'.*or of another save than"):
        folder.load(5)
    folder.save(8, {"model": {"w": torch.ones(3)}})  # other shapes
    shutil.copy(folder.step_path(8) / "index.json", saved / "index.json")
    with pytest.raises(CheckpointError, match=r"model.safetensors: has \d+ bytes, but \d+ were written"):
        folder.load(5)


def test_an_absent_step_names_those_there_are(folder: CheckpointFolder, state: Make) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; steps here: none"):
        folder.load(3)
    folder.save(1, state(1))
    folder.save(2, state(2))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; steps here: 1, 2"):
        folder.load(3)


def test_a_checkpoint_is_never_unpickled(folder: CheckpointFolder, saved: Path) -> None:
    bomb = b"\x80\x04c__builtin__\nexec\n(S'raise SystemExit'\ntR."
    for file in saved.glob("*.safetensors"):
        file.write_bytes(bomb)
    with pytest.raises(CheckpointError):
        folder.load(5)
