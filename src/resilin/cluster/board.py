"""The board on which every worker says what it does, and what is read from it when one of them hangs or is gone."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store

_READ = timedelta(seconds=5)
_SHOWN = 32  # workers in a table


@dataclass(frozen=True, slots=True)
class Status:
    """What a worker said last.

    Attributes:
        rank: its number.
        place: in words.
        step: that it works on.
        doing: in words.
        waits_for: numbers of workers.
        seconds: for how long.
        at: the line of its program.
        told: when, in seconds since the epoch.
        failed: what it failed with, in a line; empty while it goes on.
    """

    rank: int
    place: str = ""
    step: int = 0
    doing: str = "starting"
    waits_for: tuple[int, ...] = ()
    seconds: float = 0.0
    at: str = ""
    told: float = 0.0
    failed: str = ""

    @property
    def name(self) -> str:
        """For people: "worker 3 (pipeline stage 1, data 1)"."""
        return f"worker {self.rank}" + (f" ({self.place})" if self.place else "")


class Board:
    """A worker's view of the board, which lies in the job's store.

    Args:
        store: of this thread alone.
        rank: this worker's number.
        workers: how many there are.
        attempt: which start of the job this is: a store may outlive the workers.
    """

    def __init__(self, store: Store, rank: int, workers: int, attempt: str = "0") -> None:
        self._store, self._rank, self._workers = PrefixStore(f"resilin/board/{attempt}", store), rank, workers
        store.set_timeout(_READ)

    def say(self, status: Status) -> None:
        """Put up what this worker does; from then on whoever reads sees it.

        Raises:
            RuntimeError: the store is gone.
        """
        self._store.set(str(self._rank), json.dumps(asdict(status)))
        # The server answers no `set`, but takes the requests of one connection in turn: once it answers this one, the
        # status is up, also for those who learn from this worker's closed connections that it ended.
        self._store.check([str(self._rank)])

    def read(self) -> list[Status]:
        """What all workers said last.

        Raises:
            RuntimeError: the store is gone.
        """
        found = []
        for rank in range(self._workers):
            if self._store.check([str(rank)]):
                known = json.loads(self._store.get(str(rank)))
                found.append(Status(**{**known, "waits_for": tuple(known["waits_for"])}))
            else:
                found.append(Status(rank))
        return found


def explain(statuses: Sequence[Status], rank: int, now: float | None = None) -> str:
    """Why a worker cannot go on, as far as the board tells, and a table of all.

    Args:
        statuses: of all workers.
        rank: the worker that asks.
        now: seconds since the epoch; None: as the clock says.
    """
    now = time.time() if now is None else now
    failed = [status for status in statuses if status.failed and status.rank != rank]
    if failed:
        first = min(failed, key=lambda status: status.told)
        return f"{first.name} failed: {first.failed}"
    silent = [s for s in statuses if s.rank != rank and s.told and now - s.told > 10]
    busy = [s for s in statuses if not s.waits_for and s.rank != rank and s not in silent]
    lines = [f"{status.name} has not been heard of for {now - status.told:.0f} s" for status in silent]
    for status in busy:
        waiting = sum(status.rank in other.waits_for for other in statuses)
        at = f", at {status.at}" if status.at else ""
        lines.append(
            f"{status.name} waits for none, and {waiting} wait for it: it has been {status.doing} of step "
            f"{status.step} for {status.seconds:.0f} s{at}"
        )
    if not lines:
        lines.append("all workers wait for each other")
    return "\n".join([*lines[:8], "who waits for whom:", *table(statuses)])


def table(statuses: Sequence[Status]) -> list[str]:
    """A line for each worker; of very many, for those that wait for none and the first of the others."""
    if len(statuses) > _SHOWN:
        chosen = sorted(statuses, key=lambda s: (bool(s.waits_for), s.rank))[:_SHOWN]
        left = len(statuses) - len(chosen)
        return [*table(sorted(chosen, key=lambda s: s.rank)), f"  and {left} more that wait"]
    rows = [("worker", "place", "step", "does", "waits for", "seconds", "at")]
    for status in statuses:
        others = tuple(rank for rank in status.waits_for if rank != status.rank)
        rows.append(
            (
                str(status.rank), status.place, str(status.step), (status.failed and "failed") or status.doing,
                _numbers(others), f"{status.seconds:.0f}", status.at,
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _numbers(ranks: Sequence[int]) -> str:
    """`0-3, 8`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def aged(status: Status, now: float) -> Status:
    """A status as it is by now, had nothing changed since it was told."""
    return replace(status, seconds=status.seconds + max(0.0, now - status.told)) if status.told else status
