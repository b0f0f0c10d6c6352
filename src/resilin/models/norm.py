"""Norms of the residual stream and of query and key heads.

Shapes: ... any leading dimensions, D the width normed over.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.models.chain_modules import ChainNorm
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """`scale * x / sqrt(mean(x**2) + eps)` (Zhang and Sennrich, 2019)."""

    weight: nn.Parameter
    """Not `scaled`: there is none, and each call brings its own."""

    def __init__(self, size: int, eps: float, device: torch.device | str | None = None, *, scaled: bool = True) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.ones(size, device=device)) if scaled else None)
        self.eps = eps

    def forward(self, x: Tensor, weight_D: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., D), with a weight of the caller's: a part of its own where `x` is a part of the width."""
        weight_D = self.weight if weight_D is None else weight_D
        return rms_norm(x, weight_D, self.eps)


class LayerNorm(nn.Module):
    """`scale * (x - mean(x)) / sqrt(var(x) + eps)`, without a bias."""

    weight: nn.Parameter
    """As of `RMSNorm`."""

    def __init__(self, size: int, eps: float, device: torch.device | str | None = None, *, scaled: bool = True) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.ones(size, device=device)) if scaled else None)
        self.eps = eps

    def forward(self, x: Tensor, weight_D: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., D), with a weight of the caller's: a part of its own where `x` is a part of the width."""
        weight_D = self.weight if weight_D is None else weight_D
        return F.layer_norm(x, weight_D.shape, weight_D, None, self.eps)


class Transplant(nn.Module):
    """`sqrt(kappa) * x / RMS(x)`: gives queries and keys a chosen size (Wortsman et al., 2023, section 3.3)."""

    def __init__(self, kappa: float, eps: float) -> None:
        super().__init__()
        self.kappa = kappa
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return math.sqrt(self.kappa) * F.rms_norm(x, x.shape[-1:], None, self.eps)


def stream_norm(settings: DecoderSettings, device: torch.device | str | None, *, scaled: bool = True) -> nn.Module:
    """The norm of the residual stream that the settings ask for; not `scaled`: its scale is given with each call."""
    kind = RMSNorm if settings.norm == "rms" else LayerNorm
    if settings.chains is not None:
        rms_eps = settings.norm_eps if kind is RMSNorm else None
        return ChainNorm(settings.widths.hidden, lambda size: kind(size, settings.norm_eps, device), rms_eps=rms_eps)
    return kind(settings.hidden_size, settings.norm_eps, device, scaled=scaled)


def head_norm(
    settings: DecoderSettings, heads: int, device: torch.device | str | None, chains: tuple[int, ...] = ()
) -> nn.Module | None:
    """The norm of queries (or keys) of that many heads; None where the settings ask for none.

    Over each head, with one scale of head_size for all of them; or over all heads at once (`qk_norm_over = "width"`),
    with a scale of heads * head_size. Where they are heads of `chains`, so many of each, each chain has its own scale.
    """
    if settings.qk_norm == "none":
        return None
    if settings.qk_norm == "transplant":
        return Transplant(settings.qk_norm_kappa, settings.norm_eps)
    kind = RMSNorm if settings.qk_norm == "rms" else LayerNorm
    if chains:
        return ChainNorm(chains, lambda _: kind(settings.head_width, settings.norm_eps, device), dim=-2)
    size = settings.head_width * (heads if settings.qk_norm_over == "width" else 1)
    return kind(size, settings.norm_eps, device)
