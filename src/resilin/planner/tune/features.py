"""A layout as a few choices, which samplers and surrogates work on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from resilin.planner.cost import Arrangement

Choice = int | str
NAMES = ("data", "tensor", "pipeline", "context", "expert", "micro", "sharding", "schedule", "recompute")


def choices(plan: Arrangement) -> dict[str, Choice]:
    """A layout's choices; different layouts of a search differ in one of them at least."""
    d = plan.degrees
    schedule = f"{plan.parallel.schedule} x{plan.parallel.chunks}" if d.pipeline > 1 else "none"
    sharding = plan.parallel.sharding + (f" x{d.replicate}" if d.replicate > 1 else "")
    return {
        "data": d.data * d.replicate,
        "tensor": d.tensor,
        "pipeline": d.pipeline,
        "context": d.context,
        "expert": d.expert,
        "micro": plan.micro,
        "sharding": sharding,
        "schedule": schedule,
        "recompute": plan.recompute,
    }


def values(plans: Sequence[Arrangement]) -> dict[str, list[Choice]]:
    """All values of every choice that is one, in order."""
    found = {name: sorted({choices(plan)[name] for plan in plans}, key=_order) for name in NAMES}
    return {name: each for name, each in found.items() if len(each) > 1}


def numbers(plan: Arrangement, known: dict[str, list[Choice]]) -> list[float]:
    """A layout as numbers for a regressor: degrees and rows by their logarithm, names by their place."""
    own = choices(plan)
    return [math.log2(v) if isinstance(v := own[name], int) else float(each.index(v)) for name, each in known.items()]


def _order(value: Choice) -> tuple[int, str]:
    return (value, "") if isinstance(value, int) else (0, value)
