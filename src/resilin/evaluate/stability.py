"""How sensitive a model's final loss is to its learning rate, as one number.

Source: Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities" (2023), section 2.2.
A curve is the final loss at each learning rate of a set S; a run that ended in NaN or infinity has the loss None (or
a non-finite number) and counts as untrained. Losses are in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

PAPER_LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""The paper's set S of peak learning rates."""

Curve = Mapping[float, float | None]
"""Final loss by peak learning rate."""


def capped(loss: float | None, initial: float) -> float:
    """A final loss, no worse than the loss at initialisation; NaN, infinity and None count as that."""
    return min(loss, initial) if loss is not None and math.isfinite(loss) else initial


def lr_sensitivity(losses: Iterable[float | None], initial: float) -> float:
    """Mean over the set of `min(l(lr), l0) - l*`: 0 when every learning rate is as good as the best.

    Args:
        losses: the final loss at each learning rate of the set, in any order.
        initial: l0, the loss at initialisation.

    Raises:
        ValueError: for an empty set or an initial loss that is not finite.
    """
    if not math.isfinite(initial):
        raise ValueError(f"the loss at initialisation is {initial}: it must be finite to stand for diverged runs")
    values = [capped(loss, initial) for loss in losses]
    if not values:
        raise ValueError("learning rate sensitivity needs the final loss of at least one learning rate")
    best = min(values)
    return math.fsum(value - best for value in values) / len(values)


def lr_sensitivity_over_sets(curve: Curve, sets: Sequence[Sequence[float]], initial: float) -> float:
    """The least sensitivity over several sets of learning rates.

    The paper compares coupled weight decay this way: over S and over S shifted down by a step, since coupling moves
    the best learning rate.

    Raises:
        KeyError: naming a learning rate of a set that the curve lacks.
    """
    for rates in sets:
        for lr in rates:
            if lr not in curve:
                raise KeyError(f"the curve has no learning rate {lr:g}; it has {', '.join(f'{x:g}' for x in curve)}")
    return min(lr_sensitivity([curve[lr] for lr in rates], initial) for rates in sets)


def best_lr(curve: Curve, initial: float) -> float:
    """The learning rate of the lowest final loss; the smallest of equals."""
    return min(sorted(curve), key=lambda lr: capped(curve[lr], initial))


def highest_stable_lr(curve: Curve, initial: float, margin: float = 1.0) -> float | None:
    """The largest learning rate that still trains: its loss is below l0 and less than `margin` above the best.

    None where no learning rate trains at all. The rule is ours; the paper reads it off the curves.
    """
    best = min(capped(loss, initial) for loss in curve.values())
    stable = [lr for lr, loss in curve.items() if capped(loss, initial) < min(initial, best + margin)]
    return max(stable, default=None)
