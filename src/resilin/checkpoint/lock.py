"""One process at a time writes into a folder.

POSIX record locks: the system frees them when the process ends, however it ends, and a forked data worker does not
inherit them, so a worker that outlives a killed run cannot keep the next run out.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
import warnings
from errno import EACCES, EAGAIN
from pathlib import Path

from resilin.checkpoint.dying import killed_by
from resilin.checkpoint.errors import CheckpointError

_NAME = ".lock"
_DYING, _POLL = 60.0, 0.005  # seconds that one waits for a holder that is being killed, and between two looks
# Such a lock belongs to the process, and closing any descriptor of the file drops it: so one descriptor per folder
# and process, shared by all who ask and never closed while somebody holds it.
_held: dict[tuple[int, str], tuple[int, int]] = {}


def _key(folder: Path) -> tuple[int, str]:
    return os.getpid(), str(folder.resolve())


def lock_folder(folder: Path) -> None:
    """Keep other processes from locking `folder` until `unlock_folder`, or this process ends.

    Within one process it may be locked several times, and is free after as many unlocks.

    Raises:
        CheckpointError: when another process holds it, saying which.
    """
    key = _key(folder)
    if key in _held:
        handle, count = _held[key]
        _held[key] = handle, count + 1
        return
    handle = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    until = time.monotonic() + _DYING
    try:
        while not _locked(handle):
            # Whoever was killed keeps its locks until it has given up its memory.
            if time.monotonic() > until or not killed_by(_process(handle)):
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(_POLL)
    except OSError as error:
        owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
        os.close(handle)
        if error.errno in (EACCES, EAGAIN):
            raise CheckpointError(
                f"{folder}: another process ({owner or 'unknown'}) is saving checkpoints here; two runs would remove "
                "each other's: wait for it, stop it, or give this run another folder"
            ) from None
        warnings.warn(
            f"{folder}: this file system has no locks ({error.strerror}); make sure that only one run saves here",
            stacklevel=2,
        )
        return
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[key] = handle, 1


def _locked(handle: int) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (EACCES, EAGAIN):
            return False
        raise
    return True


def _process(handle: int) -> int:
    """Who has written that it holds the lock, if it is of this machine; 0: nobody."""
    said = os.pread(handle, 200, 0).decode(errors="replace").split()
    here = len(said) == 4 and said[1].isdigit() and said[3] == socket.gethostname()
    return int(said[1]) if here else 0


def unlock_folder(folder: Path) -> None:
    """Undo one `lock_folder` of this process; does nothing where there was none."""
    key = _key(folder)
    if key not in _held:
        return
    handle, count = _held.pop(key)
    if count > 1:
        _held[key] = handle, count - 1
    else:
        os.close(handle)
