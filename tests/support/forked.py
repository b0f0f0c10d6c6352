"""Ranks as real processes over gloo, forked from a process that has imported everything: a group starts in moments.

    results = run_ranks(4, work, argument)   # work(rank, argument) at each of 4 ranks; its results, by rank

Work and arguments are pickled, so `work` is a function of a test module. torch computes with one thread per rank.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).parents[2])  # where the names of test modules start
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed", "torch.distributed.fsdp", "resilin.models.decoder", "resilin.run.start"]
)


def _child(
    rank: int, world: int, meeting: str, connect: bool, pipe: Connection, work: Callable[..., Any], given: bytes
) -> None:
    import torch
    import torch.distributed as dist

    from resilin.cluster.scheduling import compute_on

    torch.set_num_threads(1)
    compute_on()
    try:
        if connect:
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
            )
        result = work(rank, *pickle.loads(given))
        if connect:
            dist.barrier()
        pipe.send_bytes(pickle.dumps((True, result)))  # by value: shared memory would go with this process
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(
    world: int, work: Callable[..., Any], *arguments: Any, timeout: float = 300, connect: bool = True
) -> list[Any]:
    """What `work(rank, *arguments)` gives at each rank.

    Args:
        world: how many ranks.
        work: a picklable function; its result is pickled too.
        arguments: the same for all ranks.
        timeout: seconds; whoever is not done by then is killed, and the test fails.
        connect: whether the ranks are connected by the default process group; False: `work` does it.

    Raises:
        AssertionError: with the traceback of the first rank that failed.
    """
    if _ROOT not in sys.path:
        sys.path.append(_ROOT)  # children look where their parent does
    given = pickle.dumps(arguments)  # by value: a shared tensor would need a file descriptor in every child
    with tempfile.TemporaryDirectory() as folder:
        meeting, pipes, processes = str(Path(folder) / "meeting"), [], []
        for rank in range(world):
            mine, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_child, args=(rank, world, meeting, connect, theirs, work, given), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        results: dict[int, Any] = {}
        try:
            left = list(range(world))
            while left:
                ready = wait([pipes[rank] for rank in left], timeout)
                assert ready, f"ranks {left} of {world} were not done after {timeout} s"
                for rank in [rank for rank in left if pipes[rank] in ready]:
                    left.remove(rank)
                    try:
                        good, results[rank] = pickle.loads(pipes[rank].recv_bytes())
                    except EOFError:
                        processes[rank].join(5)
                        raise AssertionError(f"rank {rank} ended with {processes[rank].exitcode}") from None
                    assert good, f"rank {rank} of {world} failed:\n{results[rank]}"
        finally:
            for process in processes:
                process.join(5 if len(results) == world else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
        return [results[rank] for rank in range(world)]
