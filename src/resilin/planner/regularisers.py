"""Explicit regularisers of a run: switched off where every token is seen once, strong where data are short.

With one epoch the training loss on new data is an unbiased estimate of the test loss and nothing is over-fitted, so
dropout and label smoothing only slow the training down (arXiv 1906.06669, section 2 of the digest). With fixed data and
any amount of compute the opposite holds: many epochs under a weight decay far above habit, and ensembles ("Pre-training
under infinite compute", arXiv 2509.14786).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from resilin.run.settings import RunSettings

FORCED = ("model.dropout", "objective.label_smoothing")
LEFT = ("optimizer.weight_decay",)


def _value(settings: RunSettings, key: str) -> float:
    section, name = key.split(".")
    return float(getattr(getattr(settings, section), name, 0.0) or 0.0)


def without_regularisers(settings: RunSettings, insist: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Overrides that switch the explicit regularisers off, and sentences that say so.

    Args:
        settings: of the run.
        insist: keep them; the sentences then say what they cost.
    """
    overrides, notes = [], []
    for key in FORCED:
        value = _value(settings, key)
        if not value:
            continue
        if insist:
            notes.append(f"{key} = {value:g} is kept as insisted on: with tokens seen once it only slows training")
        else:
            overrides.append(f"{key}=0.0")
            notes.append(f"{key} is set to 0 (it was {value:g}): with tokens seen once nothing is over-fitted")
    for key in LEFT:
        value = _value(settings, key)
        if value:
            notes.append(f"{key} = {value:g} is left: it steers the size of updates too; the paper's setting is 0")
    return tuple(overrides), tuple(notes)


@dataclass(frozen=True, slots=True)
class Regularised:
    """How to train on data that are short.

    Attributes:
        epochs: passes over the data.
        lr: peak learning rate, of AdamW with a cosine to 0.
        weight_decay: coupled: a step shrinks weights by lr times this.
        inside: whether size and data lie within what was tuned; else they are those of the nearest that was.
    """

    epochs: float
    lr: float
    weight_decay: float
    inside: bool

    def of_member(self) -> Regularised:
        """Of a member of a large ensemble of logits: twice the epochs, half the decay (the paper's heuristic)."""
        return Regularised(2 * self.epochs, self.lr, self.weight_decay / 2, self.inside)


TUNED: dict[float, dict[float, tuple[int, float, float]]] = {
    209.7e6: {150e6: (16, 3e-3, 0.8), 300e6: (16, 3e-3, 1.6), 600e6: (8, 1e-3, 3.2), 1.4e9: (8, 1e-3, 3.2)},
    419e6: {150e6: (32, 3e-3, 0.8), 300e6: (16, 3e-3, 0.8), 600e6: (8, 1e-3, 1.6), 1.4e9: (8, 1e-3, 3.2)},
    839e6: {150e6: (64, 3e-3, 0.4), 300e6: (16, 3e-3, 0.4), 600e6: (16, 3e-3, 0.4), 1.4e9: (8, 1e-3, 1.6)},
    1.68e9: {150e6: (64, 3e-3, 0.1), 300e6: (32, 1e-3, 0.4), 600e6: (16, 1e-3, 0.8), 1.4e9: (8, 1e-3, 0.8)},
}
"""By unique tokens and parameters (epochs, lr, weight decay), each locally optimal on a grid of factors of 2 (epochs,
decay) and about 3 (lr): the records of arXiv 2509.14786's code."""


def short_of_data(parameters: float, unique: float) -> Regularised:
    """Epochs, learning rate and weight decay for fixed data: straight between the tuned ones, in logarithms.

    Args:
        parameters: of the model.
        unique: tokens there are.

    Raises:
        ValueError: one that is not positive.
    """
    if not (parameters > 0 and unique > 0):
        raise ValueError(f"parameters and tokens should be positive, not {parameters:g} and {unique:g}")
    sizes, tokens = sorted(TUNED[209.7e6]), sorted(TUNED)
    size_at, size_in = _between(sizes, parameters)
    token_at, token_in = _between(tokens, unique)
    found = [0.0, 0.0, 0.0]
    for data, data_share in token_at:
        for size, size_share in size_at:
            for place, value in enumerate(TUNED[data][size]):
                found[place] += data_share * size_share * math.log(value)
    epochs, lr, decay = map(math.exp, found)
    return Regularised(epochs, lr, decay, size_in and token_in)


def _between(known: list[float], value: float) -> tuple[list[tuple[float, float]], bool]:
    """The known values beside one, with their shares, and whether it lies between them."""
    inside = known[0] * 0.999 <= value <= known[-1] * 1.001
    held = min(max(value, known[0]), known[-1])
    high = next(at for at in range(1, len(known)) if held <= known[at])
    share = math.log(held / known[high - 1]) / math.log(known[high] / known[high - 1])
    return [(known[high - 1], 1 - share), (known[high], share)], inside
