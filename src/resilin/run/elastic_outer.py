"""Elastic runs whose processes torchrun or Slurm starts: the first has the coordinator, and each keeps one worker.

The worker is a process of its own, so that its end is not that of the one that torchrun or srun watches: when a worker
is killed the others go on, and nobody outside notices. Where the coordinator is found, and the job's secret,
the others read from a file in the run's folder, which only this user can read.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from resilin.cluster.addresses import LOOPBACK
from resilin.cluster.handshake import read_secret
from resilin.cluster.hosts import Hosts
from resilin.cluster.keeper import Keeper, NobodyThereError, when_there
from resilin.cluster.local import worker_command
from resilin.cluster.place import FILE, Place, found
from resilin.cluster.position import Position, check_known
from resilin.cluster.starter import Door, Starter
from resilin.config import UserError
from resilin.run.settings import RunSettings


def take_part(
    place: Position,
    settings: RunSettings,
    path: Path,
    see_through: Callable[[Callable[[Path], Starter], Place], int],
) -> int:
    """Be one of the processes of a job of torchrun's or srun's; gives the code to end with.

    Args:
        place: which one.
        settings: of the run.
        path: the run's folder, on a file system that all processes share.
        see_through: launches the run, given who starts workers and where the coordinator is to listen.

    Raises:
        UserError: the coordinator was not found.
    """
    if not settings.cluster.host:
        check_known(place)
    workers, elsewhere, job = path / "workers", place.local_workers < place.workers, job_of(dict(os.environ), place)
    if place.rank:
        keeper = _keeper(workers, job, elsewhere, settings.parallel.timeout)
        with keeper.noticing():
            return keeper.run()
    host = settings.cluster.host or ("0.0.0.0" if elsewhere else LOOPBACK)
    called = settings.cluster.host or (place.address if elsewhere else LOOPBACK)
    where = Place(host, settings.cluster.port, read_secret() or "", called, job)

    def keep() -> None:
        try:
            _keeper(workers, job, elsewhere, settings.parallel.timeout).run()
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            os._exit(2)  # nobody waits for this thread, and without a worker there is no run

    threading.Thread(target=keep, name="resilin-keep", daemon=True).start()
    return see_through(lambda folder: Hosts(str(folder.resolve()), settings.cluster.silence), where)


def job_of(environment: dict[str, str], place: Position) -> str:
    """What tells one start of a job from another, from the variables of whoever started it."""
    if "SLURM_STEP_ID" in environment and "TORCHELASTIC_RUN_ID" not in environment:
        names = ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"]
    else:
        names = ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"]
    return " ".join(
        [*(environment.get(name, "") for name in names), f"{place.address}:{place.port} of {place.workers}"]
    )


def _keeper(workers: Path, job: str, elsewhere: bool, patience: float) -> Keeper:
    """This process's worker, once the first process has said where the coordinator is."""
    hint = (
        f"{workers / FILE}: the first worker has not said there where the coordinator is, for {patience:g} s "
        "(parallel.timeout); the run's folder has to be on a file system that all workers share"
    )

    def look() -> Door:
        try:
            at = found(workers)
        except FileNotFoundError:
            raise NobodyThereError(hint) from None
        if at.job != job:  # an earlier start has left it behind
            raise NobodyThereError(f"{hint}; what is there is of another job ({at.job})")
        return Door(at.host, at.port, at.secret)

    return when_there(look, lambda door: Keeper(door, 1, worker_command(), elsewhere=elsewhere), patience)
