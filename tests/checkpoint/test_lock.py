"""Who holds the lock of a folder keeps others out, unless it is being killed: then they wait."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.lock import lock_folder, unlock_folder


def holds(pipe: Connection, folder: Path) -> None:
    kept = torch.zeros(200 << 18)  # which takes the system a moment to take back
    lock_folder(folder)
    pipe.send(len(kept))
    pipe.recv()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux only")
def test_a_holder_that_lives_is_refused_and_one_that_is_killed_is_waited_for(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=holds, args=(theirs, tmp_path), daemon=True)
    process.start()
    mine.recv()
    with pytest.raises(CheckpointError, match=f"another process \\(process {process.pid} on"):
        lock_folder(tmp_path)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    lock_folder(tmp_path)  # at once: its memory is not given up yet
    unlock_folder(tmp_path)
    process.join(60)
    mine.close()
