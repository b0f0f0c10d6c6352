from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resilin.checkpoint.folder import CheckpointFolder


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor's elements, so that NaN payloads and signs of zero count."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees are equal to the bit: types, order of keys, tensors' dtype, shape and bytes."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return both and a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same_bits, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    return type(a) is type(b) and bool(a == b)


@pytest.fixture(name="same_bits", scope="session")
def same_bits_fixture() -> Callable[[Any, Any], bool]:
    return same_bits


@pytest.fixture(autouse=True, scope="module")
def a_fast_disk() -> Iterator[None]:
    """Thousands of saves: what is tested is the order of the calls; nobody cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture
def state() -> Callable[[int], dict[str, Any]]:
    """A state like a run's, different for each step."""

    def make(step: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(step)
        weight = torch.randn(17, 5, generator=draw)
        return {
            "model": {"embed.weight": weight, "head.weight": weight, "norm": torch.ones(5, dtype=torch.bfloat16)},
            "optimizer": {"moments": {"embed.weight": [torch.randn(17, 5, generator=draw), torch.zeros(())]}},
            "run": {"step": step, "best": math.nan, "names": ["a", "b"]},
        }

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    made = CheckpointFolder(tmp_path / "checkpoints")
    yield made
    made.close()


@pytest.fixture
def in_a_child() -> Callable[[Callable[[], None]], int]:
    """Run something in a forked process; gives what waitpid says."""

    def run(work: Callable[[], None]) -> int:
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(0)
        return os.waitpid(child, 0)[1]

    return run
