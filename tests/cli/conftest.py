"""A folder with a little real text and the settings of a run that takes seconds."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Done, run_command

SETTINGS = """
name = "tiny"
[source]
paths = ["text"]
sequence_length = 32
[source.tokenizer]
kind = "bytes"
[model]
hidden_size = 32
layers = 1
heads = 2
tie_embeddings = true
[optimizer]
lr = 0.01
[train]
steps = 6
batch_size = 4
threads = 1
[precision]
compute = "fp32"
[evaluation]
every = 3
batches = 2
[checkpoint]
every = 3
[log]
tensorboard = false
"""


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "text").mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("this.py", "textwrap.py", "string.py", "heapq.py"):
        source = library / name
        if source.exists():
            (folder / "text" / f"{name}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "run.toml").write_text(SETTINGS, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}


@pytest.fixture
def resilin(workplace: Path) -> Callable[..., Done]:
    return lambda *arguments: run_command(workplace, arguments)


@pytest.fixture(scope="session")
def finished_run(workplace: Path) -> Path:
    """A completed run, trained once for all tests that only look at one."""
    done = run_command(workplace, ("train", "run.toml", "--folder", "runs/finished"))
    assert done.returncode == 0, done.stderr
    return workplace / "runs" / "finished"
