"""In a Ray actor: one worker of an elastic run, as a process below the actor's own, which ends with it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from resilin.cluster.keeper import KEEPER
from resilin.cluster.local_starter import LocalStarter
from resilin.cluster.starter import ADDRESS, HOST, Door

_POLL = 0.05


class RayKeeper:
    """Starts a worker where Ray has put it.

    Args:
        number: of the worker.
        environment: what it finds beside the door.
        door: where it finds the job.
        command: what it runs.
        folder: where its output goes; on a file system that all nodes share.
        place: the folder to run in, where there is one of that name.
    """

    def __init__(
        self,
        number: int,
        environment: Mapping[str, str],
        door: Door,
        command: Sequence[str],
        folder: str,
        place: str,
    ) -> None:
        import ray

        self._number = number
        address = ray.util.get_node_ip_address()
        self._node = f"{socket.gethostname()} (node {ray.get_runtime_context().get_node_id()[:8]})"
        with suppress(OSError):
            os.chdir(place)
        Path(folder).mkdir(parents=True, exist_ok=True)
        theirs, self._ours = os.pipe()
        more = {ADDRESS: address, HOST: self._node}
        mine = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        sharing = max(1, len(os.sched_getaffinity(0)) // mine)  # as many as the node has room for
        self._starter = LocalStarter(command, Path(folder), more, {KEEPER: theirs}, sharing)
        self._starter.start(number, environment, door)
        os.close(theirs)

    def where(self) -> str:
        """Process and node of the worker, in words."""
        return f"{self._starter.running().get(self._number, 'process')} at {self._node}"

    def wait(self) -> str:
        """How the worker has ended, once it has."""
        while not (ended := self._starter.ended()):
            time.sleep(_POLL)
        return ended[0][1]

    def signal(self, which: int) -> None:
        """Send the worker a signal."""
        self._starter.signal(self._number, which)
