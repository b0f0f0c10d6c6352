"""Draws by keys: the same on every machine and after every resume."""

from __future__ import annotations

import torch
from torch import Tensor

from resilin.keys import Keys


def open_uniform(keys: Keys, count: int) -> Tensor:
    """(count,) float64, uniform in (0, 1): never 0, never 1."""
    return (keys.bits((count,))[0].double() + 0.5) * 2.0**-32


def permutation(keys: Keys, count: int) -> Tensor:
    """A random order of 0 ... count - 1, int64."""
    return torch.argsort(keys.bits((count,))[0], stable=True)


def with_replacement(keys: Keys, size: int, count: int) -> Tensor:
    """`count` numbers from 0 ... size - 1, each drawn afresh, int64."""
    return (open_uniform(keys, count) * size).long().clamp_(max=size - 1)


def without_replacement(keys: Keys, weights_N: Tensor, count: int) -> Tensor:
    """`count` different numbers drawn one after another in proportion to the weights of those left, int64.

    By the largest of log w + Gumbel noise, which has exactly that distribution (Yellott, 1977).

    Raises:
        ValueError: a weight is negative or not finite, or fewer than `count` are above 0.
    """
    weights_N = weights_N.double().cpu()
    if not bool(torch.isfinite(weights_N).all()) or bool((weights_N < 0).any()):
        raise ValueError("sampling weights should be finite and not negative")
    possible = int((weights_N > 0).sum())
    if possible < count:
        raise ValueError(f"{count} samples are to be drawn, and only {possible} have a probability above 0")
    noise_N = -torch.log(-torch.log(open_uniform(keys, len(weights_N))))
    return (weights_N.log() + noise_N).topk(count).indices
