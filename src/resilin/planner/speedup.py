"""Speed-up accounting: how much sooner one plan reaches the loss at which another ends.

    speedup of B over A = time of A to reach its final loss / time of B to first reach the same loss

(Komatsuzaki, arXiv 1906.06669). Time is whatever the curves count: seconds for wall-clock, steps, tokens or FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trace:
    """A measured loss curve.

    Attributes:
        times: ascending, positive.
        losses: one for each time.
    """

    times: tuple[float, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.times) != len(self.losses) or not self.times:
            raise ValueError(f"a trace has one loss for each time; got {len(self.times)} and {len(self.losses)}")
        if list(self.times) != sorted(set(self.times)) or self.times[0] <= 0:
            raise ValueError("the times of a trace should be positive and ascending")

    @property
    def final(self) -> float:
        """The loss at the end."""
        return self.losses[-1]

    @property
    def best(self) -> float:
        """The least loss anywhere; over-fitting makes it better than the final one."""
        return min(self.losses)

    def time_to(self, loss: float) -> float:
        """When the curve first comes down to `loss`, on straight lines between its points; infinite if never."""
        before = None
        for now, here in zip(self.times, self.losses, strict=True):
            if here <= loss:
                if before is None or before[1] <= here:
                    return now
                earlier, above = before
                return earlier + (now - earlier) * (above - loss) / (above - here)
            before = (now, here)
        return math.inf


def speedup(a: Trace, b: Trace, target: float | None = None) -> float:
    """How many times sooner B reaches a loss than A.

    Args:
        a: the baseline.
        b: the plan under test.
        target: the loss to reach; None: A's final loss. A's best loss (`a.best`) is the stricter choice where A
            over-fits.

    Returns:
        time of A / time of B: 1 for equal curves, 0 where B never reaches the loss.

    Raises:
        ValueError: A itself does not reach the target.
    """
    target = a.final if target is None else target
    reference = a.time_to(target)
    if math.isinf(reference):
        raise ValueError(f"the baseline never reaches a loss of {target:g}: choose {a.best:g} or more")
    return reference / b.time_to(target)


def chain(plans: Sequence[Trace], target: float | None = None) -> tuple[list[float], float]:
    """The speed-up of each plan over the one before it, and of the last over the first, all at one loss.

    At one common loss the steps multiply to the whole, as the paper multiplies its two gains.

    Args:
        plans: at least two, the baseline first.
        target: the loss to reach; None: the worst of the final losses, which every plan reaches.
    """
    if len(plans) < 2:
        raise ValueError("a chain of speed-ups needs at least two plans")
    common = max(plan.final for plan in plans) if target is None else target
    steps = [speedup(plans[i], plans[i + 1], common) for i in range(len(plans) - 1)]
    return steps, speedup(plans[0], plans[-1], common)
