"""How the workers of a machine share its cores.

Collectives on CPUs are carried out by threads of gloo beside the one that computes, woken by sockets and by each other
several times for one sum. Linux lets a thread that wakes up interrupt another one that computes, so that with as many
workers as cores, or more, threads that would be done in microseconds drive each other from core to core. A thread of
the policy "batch" does not interrupt others: it computes on until it waits or its slice ends. The policy needs no
privilege, costs nothing where cores are free, and is passed on to threads and processes that are started afterwards.
Threads that only hear, say and hand out what was computed leave it again: while everyone waits for them, they should
not wait for a slice to end.
"""

from __future__ import annotations

import os
from contextlib import suppress

_chosen = False  # whether the policy of this process is the one that `compute_on` gave it


def compute_on() -> bool:
    """Let this thread, and those it starts from now on, not be interrupted by who wakes up; says whether that is so.

    A policy that somebody chose for the process is left as it is.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return False
    global _chosen
    try:
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            _chosen = True
        return os.sched_getscheduler(0) == os.SCHED_BATCH
    except OSError:  # a sandbox may forbid it
        return False


def answer_at_once() -> None:
    """Undo `compute_on` for this thread, whom others wait for and who has little to do each time it is woken."""
    if _chosen:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
