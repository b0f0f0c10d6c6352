"""Checkpoints that the real libraries wrote, once for all tests, and the canonical bytes of an opened one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resilin.checkpoint.foreign.convert import open_stored
from resilin.checkpoint.foreign.stored import Stored
from resilin.checkpoint.tensor_write import host_bytes

SUPPORT = Path(__file__).parents[2] / "support"


def torchrun(script: str, *arguments: object, ranks: int = 2) -> None:
    """Run a script of the support folder on several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(SUPPORT / script), *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def run_on_ranks() -> Callable[..., None]:
    return torchrun


@pytest.fixture(scope="session")
def deepspeed_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`STAGE-DTYPE/` folders that DeepSpeed wrote on two ranks, and beside each its values as the ranks told them:
    when it was saved (`STAGE-DTYPE.safetensors`) and two steps later (`STAGE-DTYPE-later.safetensors`)."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("deepspeed")
    torchrun("deepspeed_run.py", "save", out, "1:bf16", "2:fp32", "3:bf16")
    return out


def canonical(stored: Stored | Path, only: str = "") -> str:
    """A hash of every tensor's name, dtype, shape and bytes, by name."""
    opened = open_stored(stored) if isinstance(stored, Path) else stored
    found = hashlib.sha256()
    for name in sorted(name for name in opened.names if name.startswith(only)):
        tensor = opened.tensor(name)
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        found.update(host_bytes(tensor))
    return found.hexdigest()


@pytest.fixture(scope="session")
def canonical_bytes() -> Callable[..., str]:
    return canonical
