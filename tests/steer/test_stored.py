"""What is written down comes back to the bit, and a fingerprint tells every bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.steer.fingerprint import fingerprint
from resilin.steer.stored import Decisions, from_json, to_json


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_states_survive_json_to_the_bit(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    state: dict[str, Any] = {"a": tensor, "b": [1, {"c": torch.zeros(0, dtype=dtype)}], "d": 0.1}
    back = from_json(json.loads(json.dumps(to_json(state))))
    assert torch.equal(back["a"], tensor)
    assert back["a"].dtype == dtype
    assert back["b"][1]["c"].shape == (0,)
    assert back["d"] == 0.1


def test_a_fingerprint_tells_one_bit_and_two_exchanged_values() -> None:
    values = torch.arange(6.0)
    known = fingerprint({"w": values})
    other = values.clone()
    other.view(torch.int32)[3] ^= 1
    exchanged = values[[1, 0, 2, 3, 4, 5]]
    assert len({known, fingerprint({"w": other}), fingerprint({"w": exchanged}), fingerprint({"v": values})}) == 4
    assert fingerprint({"w": values.view(2, 3)}) != known
    assert fingerprint({"w": values.clone()}) == known
    assert fingerprint({"w": values.double()}) != known
    assert fingerprint([torch.tensor(True)]) != fingerprint([torch.tensor(False)])


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    nowhere = Decisions(None, "x")
    nowhere.keep(1, "k", {})
    nowhere.log(step=1)
    assert nowhere.find(1, "k") is None
    here = Decisions(tmp_path / "new", "x")
    here.log(step=1)
    here.keep(1, "k", {"indices": [1]})
    assert here.find(1, "k") == {"indices": [1]}
    assert here.find(2, "k") is None
