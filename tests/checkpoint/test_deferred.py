"""Tensors that are made when it is their turn to be written: a state need not fit into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.checkpoint.background import BackgroundSaves
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.read import load_checkpoint
from resilin.checkpoint.write import write_checkpoint
from resilin.layout import Layout, Region, rank
from resilin.nouns import Deferred


def deferred(tensor: torch.Tensor, log: list[str], name: str) -> Deferred:
    def read() -> torch.Tensor:
        log.append(name)
        return tensor

    return Deferred(tensor.dtype, tuple(tensor.shape), read)


def test_each_is_asked_for_once_in_the_order_of_the_file_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    a, b, c = torch.randn(3, 4), torch.arange(5), torch.ones(2, dtype=torch.bfloat16)
    log: list[str] = []
    tied = deferred(a, log, "a")
    late = {"m": {"a": tied, "again": tied, "b": deferred(b, log, "b"), "c": deferred(c, log, "c")}, "run": {"step": 2}}
    now = {"m": {"a": a, "again": a, "b": b, "c": c}, "run": {"step": 2}}
    for name, tree in (("late", late), ("now", now)):
        (tmp_path / name).mkdir()
        write_checkpoint(tmp_path / name, 2, tree)
    assert log == ["b", "a", "c"]  # eight bytes an element first, then by name
    assert {f.name: f.read_bytes() for f in (tmp_path / "late").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "now").iterdir()
    }
    loaded = load_checkpoint(tmp_path / "late")
    assert loaded["m"]["again"] is loaded["m"]["a"]


def test_one_that_gives_something_else_than_it_said_is_named_and_nothing_is_committed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(ValueError, match=r"tensor 'm/a': 12 bytes came for \[0:4\]"):
        folder.save(1, {"m": {"a": Deferred(torch.float32, (4,), lambda: torch.ones(3))}})
    assert folder.steps() == []
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_rank_gives_its_region_of_one_and_a_wrong_shape_is_named(tmp_path: Path) -> None:
    layout = Layout.of({"m/a": ((4,), "F32")}, [("m/a", rank(0), Region((0,), (4,)))])
    tree: dict[str, Any] = {"m": {"a": Deferred(torch.float32, (4,), lambda: torch.arange(4.0))}}
    folder = CheckpointFolder(tmp_path)
    folder.save(1, tree, layout)
    assert torch.equal(folder.load(1)["m"]["a"], torch.arange(4.0))
    tree["m"]["a"] = Deferred(torch.float32, (3,), lambda: torch.arange(3.0))
    with pytest.raises(CheckpointError, match="the buffer has 3"):
        folder.save(2, tree, layout)


def test_a_state_that_is_too_large_to_copy_is_safe_when_the_save_returns(tmp_path: Path) -> None:
    saves = BackgroundSaves(CheckpointFolder(tmp_path))
    value = torch.ones(4)
    saves.save(1, {"m": [{"a": Deferred(torch.float32, (4,), lambda: value)}]})
    value.zero_()
    assert torch.equal(saves.folder.load(1)["m"][0]["a"], torch.ones(4))
    told = saves.poll()
    assert told is not None
    assert told.step == 1
    saves.close()
