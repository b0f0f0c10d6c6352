"""Workers as processes of this machine: what they held is free once they were ended."""

from __future__ import annotations

import fcntl
import sys
import time
from pathlib import Path

from resilin.cluster.local_starter import LocalStarter
from resilin.cluster.starter import Door

HOLD = """
import fcntl, pathlib, sys, time
handle = open(sys.argv[1], "w")
fcntl.lockf(handle, fcntl.LOCK_EX)
pathlib.Path(sys.argv[1] + ".held").touch()
time.sleep(600)
"""


def test_nobody_holds_a_lock_any_more_when_it_is_closed(tmp_path: Path) -> None:
    for attempt in range(5):
        lock = tmp_path / f"lock{attempt}"
        starter = LocalStarter([sys.executable, "-c", HOLD, str(lock)], tmp_path)
        starter.start(0, {}, Door("127.0.0.1", 1, "secret"))
        until = time.monotonic() + 200
        while not Path(f"{lock}.held").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        starter.close()
        with lock.open("w") as handle:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert [number for number, _ in starter.ended()] == [0]
