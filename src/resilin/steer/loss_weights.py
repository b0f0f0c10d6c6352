"""Weights by the samples' losses within the batch.

Source: Sow et al., "Dynamic loss-based sample reweighting for improved large language model pretraining", 2025, as
DataFlex has it.
Shapes: B samples.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from resilin.steer.weighter import StepLook, Weighter

Strategy = Literal["linupper", "uniform", "quadratic", "extremes", "identity"]


def loss_weights(losses_B: Tensor, strategy: Strategy, *, delta: float = 1.0, r: float = 1.0) -> Tensor:
    """Weights that sum to 1, (B,).

    Losses are first stretched to n in [-delta, delta] (all 0 where they are equal), then w = softmax(value / r):

    - linupper: min(n + delta, delta): low losses count less, those above the middle all alike;
    - quadratic: 1 - n^2 / delta^2: middling losses count most;
    - extremes: |n|: low and high ones do;
    - identity: n: high ones do (DataFlex calls this "uniform");
    - uniform: 0: all alike.
    """
    low, high = losses_B.min(), losses_B.max()
    width = high - low
    if float(width) > 0:
        n_B = 2 * delta * losses_B / width - delta * (high + low) / width
    else:
        n_B = torch.zeros_like(losses_B)
    if strategy == "linupper":
        value_B = (n_B + delta).clamp(max=delta)
    elif strategy == "quadratic":
        value_B = 1 - n_B.square() / delta**2
    elif strategy == "extremes":
        value_B = n_B.abs()
    elif strategy == "identity":
        value_B = n_B
    else:
        value_B = torch.zeros_like(n_B)
    return (value_B / r).softmax(0)


class LossWeights(Weighter):
    """A softmax over a function of each sample's loss among the batch's."""

    strategy: Strategy = "linupper"
    """Which losses count more: see `resilin.steer.loss_weights.loss_weights`."""
    delta: Annotated[float, Field(gt=0)] = 1.0
    """Losses are stretched to [-delta, delta]."""
    r: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the softmax."""

    def weights(self, look: StepLook) -> Tensor:
        """By the losses of the whole batch."""
        return loss_weights(look.losses().double(), self.strategy, delta=self.delta, r=self.r)
