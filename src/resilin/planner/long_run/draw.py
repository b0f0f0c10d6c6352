"""Traces drawn from laws of failure: machines by themselves, whole racks, spot machines taken away, slow machines.

Every kind of event is a renewal process for each machine (or rack) alone: it lasts, then it fails, then it is repaired.
Numbers are keyed by (seed, number of the failure, machine), so that more machines or a longer time change nothing of
what was there.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from resilin.config import Settings
from resilin.keys import Keys
from resilin.planner.long_run.laws import Law, uniform
from resilin.planner.long_run.trace import EVICT, FAIL, SLOW, Floats, Ints, Trace

Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MOST_ROUNDS, ROUNDS = 1_000_000, 16  # of one machine; of them so many are drawn at once


class MachineFailures(Law):
    """Machines fail one by one: hours from a repair (or the start) to the next failure."""

    repair: Law = Law(law="exponential", mean_hours=4.0)
    """Hours until it, or another one in its place, is there again."""


class RackFailures(Law):
    """All machines of a rack (a power unit, a switch) fail at one instant."""

    machines: Annotated[int, Field(ge=1)] = 8
    """Of a rack; machines 0, 1, 2, ... stand rack by rack."""
    repair: Law = Law(law="exponential", mean_hours=1.0)


class Evictions(Law):
    """Spot machines are taken away, and others are given later."""

    notice_seconds: Share = 120.0
    """By which it is known before: 120 at AWS, 30 at Google and Azure."""
    away: Law = Law(law="exponential", mean_hours=1.0)


class Stragglers(Law):
    """Machines are slow for a while."""

    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.5
    lasts: Law = Law(law="exponential", mean_hours=0.5)


class Failures(Settings):
    """Everything that may happen; what is not named does not."""

    machine: MachineFailures | None = None
    rack: RackFailures | None = None
    spot: Evictions | None = None
    slow: Stragglers | None = None

    def rate(self, machines: int) -> float:
        """Interruptions a second of a run on so many machines, all of them being there; what is only slow does not
        count.

        The rate of renewals in the long run: one over the mean time from one failure to the next (without the repair,
        during which a machine cannot fail).
        """
        found = machines / self.machine.mean if self.machine and self.machine.mean else 0.0
        found += machines / self.spot.mean if self.spot and self.spot.mean else 0.0
        if self.rack and self.rack.mean:
            found += -(-machines // self.rack.machines) / self.rack.mean
        return found


def draw(failures: Failures, machines: int, seconds: float, seed: int) -> Trace:
    """A trace.

    Args:
        failures: the laws.
        machines: how many.
        seconds: to cover.
        seed: of the keys.
    """
    parts: list[tuple[int, Ints, Floats, Floats, float, float]] = []
    if failures.machine is not None:
        of, at, until = _renewals(failures.machine, failures.machine.repair, machines, seconds, seed, "machine")
        parts.append((FAIL, of, at, until, 0.0, 1.0))
    if failures.rack is not None:
        wide = failures.rack.machines
        racks, at, until = _renewals(failures.rack, failures.rack.repair, -(-machines // wide), seconds, seed, "rack")
        of = (racks[:, None] * wide + np.arange(wide)).ravel()
        there = of < machines
        parts.append((FAIL, of[there], np.repeat(at, wide)[there], np.repeat(until, wide)[there], 0.0, 1.0))
    if failures.spot is not None:
        of, at, until = _renewals(failures.spot, failures.spot.away, machines, seconds, seed, "spot")
        parts.append((EVICT, of, at, until, failures.spot.notice_seconds, 1.0))
    if failures.slow is not None:
        of, at, until = _renewals(failures.slow, failures.slow.lasts, machines, seconds, seed, "slow")
        parts.append((SLOW, of, at, until, 0.0, failures.slow.factor))
    kind_E, notice_E, factor_E = (
        np.concatenate([np.full(len(part[1]), part[at], dtype=kind) for part in parts] or [np.empty(0, dtype=kind)])
        for at, kind in ((0, np.int64), (4, np.float64), (5, np.float64))
    )
    machine_E = np.concatenate([part[1] for part in parts] or [np.empty(0, dtype=np.int64)])
    time_E, until_E = (np.concatenate([part[at] for part in parts] or [np.empty(0)]) for at in (2, 3))
    order = np.lexsort((machine_E, kind_E, time_E))
    return Trace(
        machines,
        seconds,
        time_E[order],
        kind_E[order],
        machine_E[order],
        until_E[order],
        notice_E[order],
        factor_E[order],
    )


def _renewals(up: Law, down: Law, count: int, seconds: float, seed: int, name: str) -> tuple[Ints, Floats, Floats]:
    """(which, from when, until when) of all failures of `count` machines before `seconds`, machine by machine's
    round.
    """
    now_N, alive_N = np.zeros(count), np.arange(count, dtype=np.int64)
    found: list[tuple[Ints, Floats, Floats]] = []
    for number in range(MOST_ROUNDS // ROUNDS):
        keys = Keys.of_step(seed, number).fold("failures").fold(name)
        up_NK = up.seconds(uniform(keys.fold("up"), alive_N, ROUNDS))
        down_NK = down.seconds(uniform(keys.fold("down"), alive_N, ROUNDS))
        until_NK = now_N[:, None] + np.cumsum(up_NK + down_NK, axis=1)
        at_NK = until_NK - down_NK
        inside_NK = at_NK < seconds
        which_NK = np.broadcast_to(alive_N[:, None], at_NK.shape)
        found.append((which_NK[inside_NK], at_NK[inside_NK], until_NK[inside_NK]))
        on_N = until_NK[:, -1] < seconds
        now_N, alive_N = until_NK[on_N, -1], alive_N[on_N]
        if not len(alive_N):
            break
    else:
        raise ValueError(f"more than {MOST_ROUNDS} failures of one machine in {seconds:g} s: are hours meant as hours?")
    columns = list(zip(*found, strict=True))
    return np.concatenate(columns[0]), np.concatenate(columns[1]), np.concatenate(columns[2])
