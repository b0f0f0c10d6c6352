"""Traces of failures that several tests draw from."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from resilin.planner.long_run.trace import Trace

DAY = 86400.0


@st.composite
def traces(draw_: st.DrawFn, machines: int = 4, seconds: float = 1000.0, slow: bool = True) -> Trace:
    """Any trace of few events."""
    events = []
    for _ in range(draw_(st.integers(0, 8))):
        name = draw_(st.sampled_from(["fail", "evict", "slow"] if slow else ["fail", "evict"]))
        time = draw_(st.floats(0, seconds))
        until = time + draw_(st.one_of(st.floats(0, seconds), st.just(math.inf)))
        notice = draw_(st.floats(0, 100)) if name == "evict" else 0.0
        factor = draw_(st.floats(1, 4)) if name == "slow" else 1.0
        events.append((time, name, draw_(st.integers(0, machines - 1)), until, notice, factor))
    return Trace.of(machines, seconds, events)
