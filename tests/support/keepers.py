"""Machines that join an elastic run: a keeper each, as a process of its own, and its workers below it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def environment_of(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """For a process that runs `resilin`, from a clean slate as to who has started it."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "SLURM_", "RESILIN_", "GLOO_")
    left = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**left, "OMP_NUM_THREADS": "1", **(more or {})}


def resilin(*arguments: object, log: Path, inside: Sequence[str] = (), **more: str) -> subprocess.Popen[bytes]:
    """Start `resilin` with these arguments, in a session of its own."""
    with log.open("wb") as out:
        return subprocess.Popen(
            [*inside, sys.executable, "-m", "resilin", *map(str, arguments)],
            env=environment_of(more),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def until(happens: Callable[[], object], seconds: float = 200) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
