"""Workers as Ray actors on the nodes of a Ray cluster.

Workers that begin together share one placement group; each that comes later has one of its own, which waits until some
node has room, and is the demand that Ray's autoscaler sees. The place of a worker that is lost is kept: Ray moves it to
another node if its own is gone, and a worker that replaces it starts there.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resilin.cluster.ray_keeper import RayKeeper
from resilin.cluster.starter import Door
from resilin.config import UserError

_LOOK = 0.05  # seconds between two looks at what has ended


@dataclass(frozen=True, slots=True)
class _Bundle:
    """A place for a worker: one part of a placement group."""

    group: Any
    index: int


@dataclass
class _Worker:
    actor: Any
    ended: Any  # becomes how
    where: Any  # becomes where, once it is placed
    bundle: _Bundle
    said: str = "waits for a node with room"


class RayStarter:
    """Starts workers on Ray's nodes.

    Args:
        command: what every worker runs.
        folder: for their output, on a file system that all nodes share.
        together: how many begin together.
        strategy: how Ray is to spread those.
        cpus: that each is given.

    Raises:
        UserError: Ray is not installed, or cannot be reached.
    """

    steady = False

    def __init__(self, command: Sequence[str], folder: Path, together: int, strategy: str, cpus: float) -> None:
        self._ray = ray = connected()
        self._command, self._folder, self._cpus = list(command), str(folder), cpus
        self._actor = ray.remote(RayKeeper)
        self._groups = [ray.util.placement_group([{"CPU": cpus}] * together, strategy=strategy)]
        self._free = [_Bundle(self._groups[0], index) for index in range(together)]
        self._workers: dict[int, _Worker] = {}
        self._parting: dict[int, _Worker] = {}  # that the job has done with, and whose processes are about to end
        self._looked = 0.0
        self._lock = threading.RLock()

    def start(self, number: int, environment: Mapping[str, str], door: Door, at: str | None = None) -> bool:
        """Ask for an actor, which is there once Ray has a place for it; Ray alone chooses the node."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        with self._lock:
            bundle = self._free.pop(0) if self._free else self._new_bundle()
            strategy = PlacementGroupSchedulingStrategy(bundle.group, placement_group_bundle_index=bundle.index)
            actor = self._actor.options(num_cpus=self._cpus, max_concurrency=4, scheduling_strategy=strategy).remote(
                number, dict(environment), replace(door, store=None), self._command, self._folder, str(Path.cwd())
            )
            self._workers[number] = _Worker(actor, actor.wait.remote(), actor.where.remote(), bundle)
            return True

    def _new_bundle(self) -> _Bundle:
        group = self._ray.util.placement_group([{"CPU": self._cpus}])
        self._groups.append(group)
        return _Bundle(group, 0)

    def signal(self, number: int, which: int) -> bool:
        """Send a signal; SIGKILL ends the actor too."""
        with self._lock:
            worker = self._workers.get(number)
            if worker is None:
                return False
            if which == signal.SIGKILL:
                self._ray.kill(worker.actor)
            else:
                worker.actor.signal.remote(int(which))
            return True

    def gone(self, number: int) -> None:
        """Its place is free, as soon as its process has ended."""
        with self._lock:
            worker = self._workers.pop(number, None)
            if worker is not None:
                self._parting[number] = worker
                self._free.append(worker.bundle)

    def ended(self) -> list[tuple[int, str]]:
        """Who has ended, and how."""
        with self._lock:
            if time.monotonic() - self._looked < _LOOK:
                return []
            self._looked = time.monotonic()
            told = [(number, self._how(worker.ended)) for number, worker in self._among(self._workers)]
            for number, _ in told:
                self._free.append(self._workers.pop(number).bundle)
            for number, _ in self._among(self._parting):
                del self._parting[number]
            return told

    def _among(self, workers: dict[int, _Worker]) -> list[tuple[int, _Worker]]:
        """Those that have ended."""
        if not workers:
            return []
        done = set(self._ray.wait([w.ended for w in workers.values()], num_returns=len(workers), timeout=0)[0])
        return [(number, worker) for number, worker in workers.items() if worker.ended in done]

    def _how(self, ended: Any) -> str:
        try:
            return str(self._ray.get(ended))
        except self._ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return f"was lost with its Ray actor: {lines[0] if lines else type(error).__name__:.200}"

    def running(self) -> dict[int, str]:
        """By number where, or that it waits for a place."""
        with self._lock:
            for worker in self._workers.values():
                if worker.where is not None and self._ray.wait([worker.where], timeout=0)[0]:
                    worker.said, worker.where = self._how(worker.where), None
            return {number: worker.said for number, worker in self._workers.items()}

    def log(self, number: int) -> str:
        """Where a worker's output goes."""
        return f"{self._folder}/worker-{number}.log"

    def part(self, code: int) -> None:
        """Whoever waits for a place waits no more."""
        with self._lock:
            for number, worker in list(self._workers.items()):
                if worker.where is not None:
                    self._ray.kill(worker.actor)
                    del self._workers[number]

    def close(self) -> None:
        """End actors, and give their places back."""
        with self._lock:
            for worker in (*self._workers.values(), *self._parting.values()):
                self._ray.kill(worker.actor)
            for group in self._groups:
                self._ray.util.remove_placement_group(group)
            self._workers.clear()
            self._parting.clear()


def connected() -> Any:
    """Ray, connected to the cluster that `RAY_ADDRESS` names, or the one of this machine, or a new one here.

    Raises:
        UserError: it is not installed, or cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise UserError('cluster.launcher = "ray" needs Ray: pip install "resilin[ray]"') from None
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError) as error:
            raise UserError(
                f"Ray's cluster cannot be reached ({os.environ.get('RAY_ADDRESS', 'here')}): {error}"
            ) from None
    return ray


def own_ray_address() -> str:
    """The address of this machine in Ray's cluster."""
    return str(connected().util.get_node_ip_address())
