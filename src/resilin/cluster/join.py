"""Workers finding each other, agreeing on what they are to do, and parting."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.rendezvous import rendezvous

from resilin.cluster.position import Position, check_known
from resilin.cluster.scheduling import compute_on
from resilin.cluster.watch import Watch
from resilin.parallel.activity import waiting
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.messages import tell_all
from resilin.parallel.world import World


@contextmanager
def joined(place: Position, device: torch.device, timeout: float) -> Iterator[None]:
    """While entered, this worker is connected to all others, and says on a board what it does (`cluster/watch.py`).

    Args:
        place: which worker this is.
        device: that it computes on: NCCL connects GPUs, gloo everything else.
        timeout: seconds that a worker waits for another.

    Raises:
        UserError: the first worker's node has a name that is not known here.
        ParallelError: the others cannot be reached.
        StrandedError: another worker failed, went away or hangs while this one was in the body.
    """
    check_known(place)
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        compute_on()
    # torchrun's store still has what workers have left there before it started them anew.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = _store(place, timedelta(seconds=timeout))
        dist.init_process_group(
            backend,
            store=PrefixStore(f"resilin/{attempt}", store),
            rank=place.rank,
            world_size=place.workers,
            timeout=timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise ParallelError(
            f"worker {place.rank} of {place.workers} did not find the others at {place.address}:{place.port} within "
            f"{timeout:g} s: {error}"
        ) from error
    watch = Watch(store, place.rank, place.workers, timeout, attempt)
    try:
        yield
    except Exception as error:
        told = watch.failed(error)
        if told is error:
            raise
        raise told from error
    finally:
        watch.close()
        dist.destroy_process_group()
        let_go()


_LET_GO = 0.05


def let_go() -> None:
    """Leave gloo's threads a moment to drop the tensors of the last exchange, for which they need the interpreter.

    They do so after whoever waited for it goes on. If that one ends the process at once, without anything that gives
    the interpreter away, torch 2.13 aborts the process ("terminate called without an active exception").
    """
    time.sleep(_LET_GO)


def _store(place: Position, timeout: timedelta) -> Any:
    """Of the job: at the first worker, or where torchrun keeps one."""
    if place.listening is not None:  # our launcher found a free port by listening on it
        return TCPStore(place.address, place.port, place.workers, True, timeout, master_listen_fd=place.listening)
    store, _, _ = next(rendezvous(f"tcp://{place.address}:{place.port}", place.rank, place.workers, timeout=timeout))
    return store


@contextmanager
def lead_first(world: World | None) -> Iterator[None]:
    """The body, at the first worker before it is begun at any other."""
    if world is None or world.size == 1:
        yield
        return
    if world.rank:
        with waiting((0,), "waiting for what the first worker prepares"):
            dist.barrier()
    yield
    if not world.rank:
        with waiting(range(world.size), "waiting for the others to be ready"):  # groups are made by all together
            dist.barrier()


def agree_on(what: str, mine: dict[str, Any], group: Group) -> None:
    """Refuse to go on where workers were given different things.

    Args:
        what: for people: "settings".
        mine: this worker's, a tree of JSON values.
        group: all workers, who call together.

    Raises:
        ParallelError: at all workers, naming the first difference and who has what.
    """
    told = tell_all(_flat(mine), group)
    for index, theirs in enumerate(told):
        for key in sorted({*told[0], *theirs}):
            if told[0].get(key) != theirs.get(key):
                raise ParallelError(
                    f"the workers have different {what}: {key} is {told[0].get(key)!r} at worker {group.ranks[0]} and "
                    f"{theirs.get(key)!r} at worker {group.ranks[index]}; start all with the same"
                )


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{path}.{key}" if path else str(key))
    return found
