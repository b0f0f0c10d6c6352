"""Initial values of what is special about Mamba-2 layers, as in the published code (Dao and Gu, 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resilin.models.hybrid_settings import MambaSettings

_LARGEST_DECAY = 16.0
_SMALLEST_STEP = 1e-4


def mamba_values(name: str, shape: torch.Size, settings: MambaSettings, generator: torch.Generator) -> Tensor | None:
    """Values of one parameter; None for those that are drawn like any other.

    A is uniform in [1, 16]; dt_bias such that the first steps are log-uniform in [dt_min, dt_max]; D is 1; the
    convolution uniform in +-1/sqrt(K), for K tokens that it reads.
    """
    kind = name.rpartition(".")[2]
    if kind == "A_log":
        return torch.empty(shape).uniform_(1.0, _LARGEST_DECAY, generator=generator).log()
    if kind == "dt_bias":
        low, high = math.log(settings.dt_min), math.log(settings.dt_max)
        steps = torch.empty(shape).uniform_(low, high, generator=generator).exp().clamp(min=_SMALLEST_STEP)
        return steps + torch.log(-torch.expm1(-steps))  # softplus gives the steps back
    if ".conv_" in name and kind == "weight":
        bound = shape[-1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return None
