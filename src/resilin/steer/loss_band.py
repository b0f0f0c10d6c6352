"""Selectors by the model's loss: a class of hard, middling or easy samples; samples by how fast they are learnt."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from resilin.steer.draws import permutation, without_replacement
from resilin.steer.look import Look
from resilin.steer.selector import Selection, Selector

Share = Annotated[float, Field(gt=0, lt=1)]


class LossBand(Selector):
    """Draws more often from the third of the pool whose loss is high, medium or low now (DataFlex, "loss")."""

    focus: Literal["low", "medium", "high"] = "medium"
    """The favoured class."""
    factor: Annotated[float, Field(gt=0)] = 5.0
    """How much more a sample of it weighs."""
    quantiles: tuple[Share, Share] = (0.33, 0.66)
    """Where the losses are cut."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Probabilities are in proportion to weight ** (1 / temperature)."""

    def weights(self, losses_N: Tensor) -> Tensor:
        """The sampling weight of each sample, (N,)."""
        cuts = torch.quantile(losses_N.double(), torch.tensor(self.quantiles, dtype=torch.float64))
        band_N = torch.bucketize(losses_N.double(), cuts, right=True)
        chosen = ("low", "medium", "high").index(self.focus)
        weights_N = torch.where(band_N == chosen, self.factor, 1.0).double()
        return weights_N ** (1 / self.temperature)

    def select(self, look: Look) -> Selection:
        """Without replacement."""
        losses_N = look.losses(look.pool)
        chosen = without_replacement(look.keys("loss band"), self.weights(losses_N), look.count)
        figures = {"loss of the pool": float(losses_N.mean()), "loss of the chosen": float(losses_N[chosen].mean())}
        return Selection(chosen, figures)


class DeltaLoss(Selector):
    """Draws around a window that slides, update by update, from the samples learnt fastest to those learnt slowest.

    Samples are ranked by how much their loss has fallen since the first selection, which only stores the losses and
    draws at random (DataFlex, "delta loss").
    """

    share: Share = 0.2
    """Width of the window, of the pool."""
    steepness: Annotated[float, Field(gt=0)] = 10.0
    """Of the sigmoid by which the window moves."""
    outside: Annotated[float, Field(gt=0)] = 0.025
    """Weight of a sample outside; inside it is 1."""

    def window(self, size: int, update: int, updates: int | None) -> tuple[int, int]:
        """First and last + 1 rank of the window at selection `update` of `updates`; it moves with the update.

        With a single selection, or without an end, there is no way to go: the window stands at the start.
        """
        place = (update - 1) / (updates - 1) if updates is not None and updates > 1 else 0.0
        width = self.share * size
        start = (size - width) / (1 + math.exp(-self.steepness * (place - 0.5)))
        first = min(int(start), size - 1)
        return first, min(size, max(first + 1, int(start + width)))

    def weights(self, fallen_N: Tensor, update: int, updates: int | None) -> Tensor:
        """The sampling weight of each sample, given how much its loss has fallen.

        The window ends at the first sample whose loss has risen; where nothing is left of it, all weigh the same.
        """
        order = torch.argsort(fallen_N, descending=True, stable=True)
        first, last = self.window(len(fallen_N), update, updates)
        last = min(last, int((fallen_N >= 0).sum()))
        weights_N = torch.full((len(fallen_N),), self.outside, dtype=torch.float64)
        weights_N[order[first:last]] = 1.0
        return weights_N

    def select(self, look: Look) -> Selection:
        """Without replacement."""
        losses_N = look.losses(look.pool)
        if "initial" not in look.memory:
            look.memory["initial"] = losses_N
            return Selection(permutation(look.keys("delta loss"), look.size)[: look.count])
        fallen_N = look.memory["initial"] - losses_N
        weights_N = self.weights(fallen_N, look.update, look.updates)
        chosen = without_replacement(look.keys("delta loss"), weights_N, look.count)
        figures = {
            "mean fall of the loss": float(fallen_N.mean()),
            "in the window": float((weights_N == 1.0).sum()),
            "fall of the chosen": float(fallen_N[chosen].mean()),
        }
        return Selection(chosen, figures)
