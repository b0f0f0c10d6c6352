"""What a run does not change is on the disk once, and every checkpoint is whole all the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.link import LINK_FROM
from resilin.checkpoint.verify import verify_checkpoint


def tree(step: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(LINK_FROM // 4, generator=generator)
    return {"frozen": {"base": base, "small": torch.arange(3)}, "model": {"adapter": torch.full((600_000,), step)}}


def links(path: Path) -> int:
    return path.stat().st_nlink


def test_an_unchanged_file_is_linked_and_a_changed_one_is_written(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2, 3):
        folder.save(step, tree(step))
    files = [folder.step_path(step) / "frozen.safetensors" for step in (1, 2, 3)]
    assert len({file.stat().st_ino for file in files}) == 1
    assert links(folder.step_path(3) / "model.safetensors") == 1
    for step in (1, 2, 3):
        verify_checkpoint(folder.step_path(step))
        loaded = folder.load(step)
        assert torch.equal(loaded["frozen"]["base"], tree(0)["frozen"]["base"])
        assert int(loaded["model"]["adapter"][0]) == step


def test_pruning_one_checkpoint_leaves_the_file_to_the_others(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep_last=1)
    for step in (1, 2, 3):
        folder.save(step, tree(step))
    assert folder.steps() == [3]
    assert links(folder.step_path(3) / "frozen.safetensors") == 1
    verify_checkpoint(folder.step_path(3))


@pytest.mark.parametrize("where", ["first", "last", "dtype", "name", "fewer"])
def test_any_difference_writes_the_file_anew(tmp_path: Path, where: str) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, tree(1))
    changed = tree(1)
    frozen = changed["frozen"]
    if where == "first":
        frozen["base"][0] += 1
    elif where == "last":
        frozen["small"][-1] += 1
    elif where == "dtype":
        frozen["base"] = frozen["base"].view(torch.int32)
    elif where == "name":
        frozen["other"] = frozen.pop("base")
    else:
        del frozen["small"]
    folder.save(2, changed)
    file = folder.step_path(2) / "frozen.safetensors"
    assert links(file) == 1
    verify_checkpoint(folder.step_path(2))
    loaded = folder.load(2)["frozen"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in frozen.items())


def test_an_earlier_file_that_was_damaged_is_not_linked(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, tree(1))
    file = folder.step_path(1) / "frozen.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    folder.save(2, tree(1))
    verify_checkpoint(folder.step_path(2))
    written = folder.step_path(2) / "frozen.safetensors"
    assert links(written) == 1
    assert written.read_bytes() != bytes(raw)


def test_a_disk_without_links_gets_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    folder = CheckpointFolder(tmp_path)
    folder.save(1, tree(1))
    folder.save(2, tree(2))
    assert links(folder.step_path(2) / "frozen.safetensors") == 1
    verify_checkpoint(folder.step_path(2))
