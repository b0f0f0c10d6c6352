"""Checkpoints of the first format, one piece and one checksum for each tensor, are read as before."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.reader import CheckpointReader
from resilin.checkpoint.verify import damages, verify_checkpoint
from resilin.layout import Region

STATE = {
    "model": {"w": torch.randn(700, 600), "b": torch.arange(9, dtype=torch.bfloat16), "none": torch.empty(0, 3)},
    "run": {"step": 7},
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """As version 1 wrote it: the same files, another index."""
    folder = CheckpointFolder(tmp_path)
    folder.save(7, STATE)
    at = folder.step_path(7)
    content = json.loads((at / "index.json").read_text())["content"]
    data = (at / "model.safetensors").read_bytes()
    tensors = {}
    for name, entry in content["tensors"].items():
        ((_, inner, begin, _, _, _),) = entry["pieces"]
        tensor = STATE["model"][inner]
        raw = data[begin : begin + tensor.numel() * tensor.element_size()]
        checksum = f"crc32:{zlib.crc32(raw):08x}"
        tensors[name] = {"file": "model.safetensors", "name": inner, "dtype": entry["dtype"]}
        tensors[name] |= {"shape": entry["shape"], "checksum": checksum}
    files = {file.pop("name"): file for file in content["files"]}
    body = json.dumps({"step": 7, "files": files, "tensors": tensors, "tree": content["tree"]}, separators=(",", ":"))
    head = {"format": "resilin-checkpoint", "version": 1, "checksum": f"crc32:{zlib.crc32(body.encode()):08x}"}
    (at / "index.json").write_text(json.dumps(head)[:-1] + f', "content": {body}}}')
    return at


def test_it_is_loaded_to_the_bit_whole_and_in_parts(old: Path, same_bits: Callable[[Any, Any], bool]) -> None:
    folder = CheckpointFolder(old.parent)
    assert same_bits(folder.load(7), STATE)
    assert same_bits(folder.load(7, mapped=True), STATE)
    verify_checkpoint(old)
    with CheckpointReader(old) as saved:
        part = saved.tensor("model/w", region=Region((10, 3), (600, 500)))
    assert torch.equal(part, STATE["model"]["w"][10:610, 3:503])


def test_damage_is_found_in_it_too(old: Path) -> None:
    file = old / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1_000_000] ^= 1
    file.write_bytes(data)
    (found,) = damages(old)
    assert "model.safetensors: the checksum of tensor 'w'" in found
    for region in (None, Region((699, 0), (1, 600))):  # the one checksum covers every part
        with CheckpointReader(old) as saved, pytest.raises(CheckpointError, match="checksum of tensor 'w'"):
            saved.tensor("model/w", region=region)


def test_the_next_save_is_of_the_new_version(old: Path, same_bits: Callable[[Any, Any], bool]) -> None:
    folder = CheckpointFolder(old.parent)
    folder.save(8, folder.load(7))
    assert json.loads((folder.step_path(8) / "index.json").read_text())["version"] == 2
    assert same_bits(folder.load(8), STATE)
