"""SLoRB: what a mask takes from a row, given back as one number for each group of k inputs.

y = W~ x + S (X x): X (C/k, C) sums the inputs of each group, S (D, C/k) starts at what the mask took. With k = 16, S is
C * D / 16 numbers, an eighth of what 2:4 keeps. A fixed X is a sum over the group and no matrix.

Source: Huang et al., "Pruning large language models with semi-structural adaptive sparse training", arXiv 2407.20584,
"Sparse low-rank boosting"; the published code multiplies by X also where it is fixed.

Shapes: D outputs, C inputs, k group, G = C / k.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from resilin.config import Settings
from resilin.keys import Keys

Init = Literal["mean", "sum", "zero", "xavier"]


class LowRankBoost(Settings):
    """A trained correction of rank C / k beside each masked weight."""

    k: int = Field(default=16, gt=0)
    """Inputs that share a number; must divide the inputs of every masked layer."""
    init: Init = "mean"
    """How S starts. mean: the mean over each group of what the mask took, which keeps the group's mean weight; sum: k
    times that; zero; xavier: S zero and X drawn (needs `train_pooling`)."""
    train_pooling: bool = False
    """Whether X is a trained matrix, C * C / k parameters more in every layer, instead of the sum it starts as."""

    @model_validator(mode="after")
    def _xavier_is_a_matrix(self) -> LowRankBoost:
        if self.init == "xavier" and not self.train_pooling:
            raise ValueError("init xavier draws the pooling matrix X: set train_pooling = true, or use mean")
        return self


def pooled(x: Tensor, k: int) -> Tensor:
    """X x without the matrix: (..., C) -> (..., C / k), the sum of every k consecutive inputs."""
    groups: Tensor = x.unflatten(-1, (-1, k))
    return groups.sum(-1)


def pooling_matrix(inputs: int, k: int) -> Tensor:
    """X (G, C) as it starts: X[g, j] = 1 where g * k <= j < (g + 1) * k."""
    return torch.eye(inputs // k).repeat_interleave(k, 1)


def initial_correction(weight_DC: Tensor, mask_DC: Tensor, boost: LowRankBoost) -> Tensor:
    """S (D, G) as it starts."""
    pruned_DGk: Tensor = weight_DC.masked_fill(mask_DC, 0.0).unflatten(1, (-1, boost.k))
    if boost.init == "mean":
        return pruned_DGk.mean(-1)
    if boost.init == "sum":
        return pruned_DGk.sum(-1)
    return pruned_DGk.new_zeros(pruned_DGk.shape[:2])


def xavier(inputs: int, k: int, keys: Keys) -> Tensor:
    """X (G, C) uniform in +-sqrt(6 / (C + G)) (Glorot and Bengio, 2010)."""
    groups = inputs // k
    bound = (6 / (inputs + groups)) ** 0.5
    return torch.empty(groups, inputs).uniform_(-bound, bound, generator=keys.generator())
