"""How often to save, in closed form: Young (1974), and Daly's higher order estimate and expected time (2006).

Letters: `save` seconds of a checkpoint, `apart` the mean seconds between interruptions, which have no memory.
"""

from __future__ import annotations

import math


def young(save: float, apart: float) -> float:
    """Seconds of work between two checkpoints: sqrt(2 save apart)."""
    return math.sqrt(2 * save * apart) if math.isfinite(apart) else math.inf


def daly(save: float, apart: float) -> float:
    """Daly's equation 37: sqrt(2 save apart) (1 + sqrt(x) / 3 + x / 9) - save, x = save / (2 apart); else `apart`."""
    if not math.isfinite(apart):
        return math.inf
    if save >= 2 * apart:
        return apart
    part = save / (2 * apart)
    return math.sqrt(2 * save * apart) * (1 + math.sqrt(part) / 3 + part / 9) - save


def expected(work: float, interval: float, save: float, restart: float, apart: float) -> float:
    """Daly's expected seconds of a run: apart e^(restart/apart) (e^((interval + save)/apart) - 1) work / interval.

    Exact where every interval is saved and a failure may strike checkpoints and restarts too; only that the last
    interval needs no checkpoint is left out.
    """
    if not math.isfinite(apart):
        return work * (1 + save / interval)
    return apart * math.exp(restart / apart) * math.expm1((interval + save) / apart) * work / interval


def fewest(save: float, apart: float) -> float:
    """The interval of which `expected` is least, to the last digits, whatever the restart takes.

    Where (e^((t + save)/apart) - 1) / t is least, 1 - t / apart = e^-((t + save)/apart): found by halving.
    """
    if not math.isfinite(apart):
        return math.inf
    low, high = 0.0, apart
    for _ in range(200):
        half = (low + high) / 2
        low, high = (half, high) if 1 - half / apart > math.exp(-(half + save) / apart) else (low, half)
    return (low + high) / 2
