"""Initial weights of vision models: functions of the seed and each parameter's name only."""

from __future__ import annotations

import math

import torch
from torch import nn

from resilin.keys import Keys
from resilin.models.initial import truncated_normal


@torch.no_grad()
def fill_convolutional(model: nn.Module, seed: int, *, zero_last: str = "") -> None:
    """He et al. (2015): normal with variance 2 / fan-out for convolutions, std 0.01 for the head, norms 1 and 0.

    Args:
        model: to fill in place.
        seed: of the run.
        zero_last: ending of the names of norm scales that begin at 0, so that a residual block begins as the identity
            (Goyal et al., 2017); "" for none.
    """
    keys = Keys.of_step(seed, 0).fold("initial weights")
    for name, parameter in model.named_parameters():
        generator = keys.fold(name).generator()
        if parameter.ndim == 1:
            one = name.endswith("weight") and not (zero_last and name.endswith(zero_last))
            parameter.fill_(1.0 if one else 0.0)
        elif parameter.ndim == 2:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.01, generator=generator))
        else:
            fan_out = parameter.shape[0] * math.prod(parameter.shape[2:])
            std = math.sqrt(2.0 / fan_out)
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


@torch.no_grad()
def fill_transformer(model: nn.Module, seed: int, std: float = 0.02) -> None:
    """Truncated normal for matrices and embeddings, norm scales 1, biases 0, the head 0 (Dosovitskiy et al., 2021)."""
    keys = Keys.of_step(seed, 0).fold("initial weights")
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name == "head.weight":
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(truncated_normal(parameter.shape, std, keys.fold(name).generator()))
