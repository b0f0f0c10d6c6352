"""What new groups take once a member is lost: Resilin's edit against rebuilding torch's groups, all or some.

N processes of this machine are in groups over gloo: one of all, another of all for what goes from stage to stage, and
one for each of two stages. The last process is killed (SIGKILL). Once it is dead, all others are told at one moment,
and what is timed is from there until the last of them has summed a number over the new groups of all, and of its stage:
- Resilin: `resilin.cluster.links`: the old sockets are cut, and the groups of the next epoch made. A connection to the
  store is ready, as in a member that has trained for some seconds since the change before.
- full rebuild: `destroy_process_group()`, `init_process_group` for those who are left, and all groups with `new_group`.
- partial rebuild: the groups that had the dead member are destroyed, and made anew with
  `new_group(use_local_synchronization=True)`; the other stage's group stays, and the default group stays broken.
How long it takes to notice the loss is no part of it. Every measurement has processes of its own, which are forked once
torch is loaded; the three take turns.

    resilin bench run edit
    resilin bench run edit --quick
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from resilin.bench.results import Report, Row, results_name
from resilin.cluster.links import Links
from resilin.cluster.store_connections import StoreConnections
from resilin.parallel.group import Group

TIMEOUT = 120.0
FORK = multiprocessing.get_context("fork")
STAGES = 2
READY = "ready"


def stages_of(members: int, count: int) -> list[list[int]]:
    """By stage its members: runs of neighbours, as even as can be; fewer stages than two where members are few."""
    stages = min(STAGES, members)
    bounds = [members * stage // stages for stage in range(stages + 1)]
    return [[rank for rank in range(a, b) if rank < count] for a, b in pairwise(bounds)]


def check(total: torch.Tensor, members: int, what: str) -> None:
    if int(total) != members:
        raise RuntimeError(f"{what}: {members} members add up to {int(total)}")


class Ours:
    """Groups that are edited."""

    def __init__(self, port: int, rank: int, members: int) -> None:
        store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=TIMEOUT))
        self._stores = StoreConnections(store)
        self._rank, self._members, self._epoch = rank, members, 0
        self._join(members)
        until = time.monotonic() + TIMEOUT
        while not self._stores.is_ready and time.monotonic() < until:
            time.sleep(0.05)

    def _join(self, count: int) -> None:
        self._links = Links(self._stores, self._epoch, self._rank, TIMEOUT)
        everyone = self._links.group("everyone", range(count))
        self._links.group("stages", range(count))
        self._sum(everyone, count, "everyone")
        for stage, ranks in enumerate(stages_of(self._members, count)):
            if self._rank in ranks:
                self._sum(self._links.group(f"stage{stage}", ranks), len(ranks), "the stage")

    def _sum(self, group: Group, count: int, what: str) -> None:
        total = torch.ones(1)
        if group.process_group is not None:
            group.wait(group.process_group.allreduce([total]))
        check(total, count, what)

    def lose_last(self) -> None:
        self._links.cut()
        self._epoch += 1
        self._join(self._members - 1)


class Full:
    """Torch's groups, all of them anew."""

    def __init__(self, port: int, rank: int, members: int) -> None:
        self._store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=TIMEOUT))
        self._rank, self._members, self._epoch = rank, members, 0
        self._join(members)

    def _join(self, count: int) -> None:
        store = PrefixStore(f"epoch{self._epoch}", self._store)
        dist.init_process_group(
            "gloo", store=store, rank=self._rank, world_size=count, timeout=timedelta(seconds=TIMEOUT)
        )
        dist.new_group(list(range(count)))
        several = [ranks for ranks in stages_of(self._members, count) if len(ranks) > 1]
        found = [dist.new_group(ranks) for ranks in several]
        summed(None, count, "everyone")
        for group, ranks in zip(found, several, strict=True):
            if self._rank in ranks:
                summed(group, len(ranks), "the stage")

    def lose_last(self) -> None:
        dist.destroy_process_group()
        self._epoch += 1
        self._join(self._members - 1)


class Partial:
    """Torch's groups, those with the dead member anew.

    A group that not everybody makes has its name from its ranks and from how many groups a process has; where these are
    not equally many at all members, they wait for each other for ever. So the groups of all come before the stage's.
    """

    def __init__(self, port: int, rank: int, members: int) -> None:
        self._rank, self._members = rank, members
        store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=TIMEOUT))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=members, timeout=timedelta(seconds=TIMEOUT))
        self._stage = self._new(self._mine(members))
        self._all, self._line = self._new(range(members)), self._new(range(members))
        self._check(members)

    def _new(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        return dist.new_group(list(ranks), use_local_synchronization=True)

    def _check(self, count: int) -> None:
        summed(self._all, count, "everyone")
        summed(self._stage, len(self._mine(count)), "the stage")

    def _mine(self, count: int) -> list[int]:
        return next(ranks for ranks in stages_of(self._members, count) if self._rank in ranks)

    def lose_last(self) -> None:
        left = self._members - 1
        dist.destroy_process_group(self._all)
        dist.destroy_process_group(self._line)
        self._all, self._line = self._new(range(left)), self._new(range(left))
        if left in self._mine(self._members):
            dist.destroy_process_group(self._stage)
            self._stage = self._new(self._mine(left))
        self._check(left)


def summed(group: dist.ProcessGroup | None, count: int, what: str) -> None:
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    check(total, count, what)


Kind = Callable[[int, int, int], Ours | Full | Partial]
KINDS: dict[str, Kind] = {
    "ours": Ours,
    "full rebuild of torch's groups": Full,
    "partial rebuild of torch's groups": Partial,
}


def member(kind: Kind, rank: int, members: int, told: Connection) -> None:
    """A process: it joins, hears of the loss, goes on without the last one, and says when that was done."""
    try:
        torch.set_num_threads(1)
        groups = kind(int(told.recv()), rank, members)
        told.send(READY)
        told.recv()
        groups.lose_last()
        told.send(time.monotonic())
        told.recv()
    except BaseException:
        told.send(traceback.format_exc())
    os._exit(0)  # gloo's own end is no part of it


def once(kind: Kind, members: int) -> float:
    """Seconds from when all who are left are told until the last of them has gone on."""
    ends, processes = [], []
    try:
        for rank in range(members):
            near, far = FORK.Pipe()
            process = FORK.Process(target=member, args=(kind, rank, members, far), daemon=True)
            process.start()
            ends.append(near)
            processes.append(process)
        # Only now, as a process with threads, of which the store has some, must not be forked.
        store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=TIMEOUT), wait_for_workers=False)
        for end in ends:
            end.send(store.port)
        for rank, end in enumerate(ends):
            heard(end, f"process {rank} joins")
        victim = processes[-1].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        processes[-1].join()
        begun = time.monotonic()
        for end in ends[:-1]:
            end.send("lost")
        done = [float(heard(end, f"process {rank} goes on")) for rank, end in enumerate(ends[:-1])]
        return max(done) - begun
    finally:
        for process in processes:
            process.kill()
            process.join()
        for end in ends:
            end.close()


def heard(end: Connection, what: str) -> str | float:
    if not end.poll(TIMEOUT):
        raise SystemExit(f"{what}: nothing was heard of it for {TIMEOUT:g} s")
    said: str | float = end.recv()
    if isinstance(said, str) and said != READY:
        raise SystemExit(f"{what}: {said}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="2,4,8,16,32", help="how many there are before one is lost")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 and 3 processes, one round")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.quick:
        args.processes, args.rounds = "2,3", 1
    sizes = [int(size) for size in args.processes.split(",")]
    if min(sizes) < 2:
        raise SystemExit("--processes: one is lost, and one has to be left: 2 or more")
    rows = []
    for size in sizes:
        times: dict[str, list[float]] = {name: [] for name in KINDS}
        for number in range(args.rounds):
            for name, kind in KINDS.items():
                times[name].append(once(kind, size))
            said = ", ".join(f"{name} {took[-1] * 1000:.1f} ms" for name, took in times.items())
            print(f"{size} processes, round {number}: {said}", flush=True)
        rows += rows_of(size, times)
    settings = {"processes": sizes, "rounds": args.rounds, "stages": STAGES, "backend": "gloo"}
    print(f"wrote {Report.of(results_name('edit', 'cpu'), settings, rows).write(args.output)}")


def rows_of(size: int, times: dict[str, list[float]]) -> list[Row]:
    """Ours against each of the others, and against the second that a whole edit may take."""
    title = f"{size} processes, one killed: new groups, to a sum over them"
    rows = [
        Row.from_turns(title, "s", times["ours"], theirs, name, better="lower", target=1.0)
        for name, theirs in times.items()
        if name != "ours"
    ]
    ours = statistics.median(times["ours"])
    made = {"unit": "s", "ours": ours, "peer": 1.0, "peer_name": "the aim", "better": "lower", "target": 1.0}
    return [*rows, Row(name=title, runs={"ours": times["ours"]}, **made)]


if __name__ == "__main__":
    main()
