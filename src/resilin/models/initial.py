"""Initial weights: each parameter's values are a function of the seed and its name only.

They are drawn on the CPU, so the order of construction, the device and the other parameters change nothing.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.hybrid_settings import HybridSettings
from resilin.models.mamba_initial import mamba_values

# Standard deviation of a unit normal cut at two standard deviations.
_CUT_STD = 0.8796256610342398
_CHAIN = re.compile(r"\.chains\.(\d+)(?=\.)")
_BACK = re.compile(r"(attention\.o|\bdown)\.weight$|experts\.down$")
"""Projections back to the stream."""


def truncated_normal(shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
    """Values of standard deviation `std` from a normal whose draws beyond two standard deviations are redrawn."""
    sigma = std / _CUT_STD
    return nn.init.trunc_normal_(torch.empty(shape), 0.0, sigma, -2 * sigma, 2 * sigma, generator=generator)


def _values(name: str, shape: torch.Size, settings: DecoderSettings, generator: torch.Generator) -> Tensor:
    if ".mamba." in name and isinstance(settings, HybridSettings):
        own = mamba_values(name, shape, settings.mamba, generator)
        if own is not None:
            return own
    if name.endswith("bias") or (settings.zero_query_init and name.endswith("attention.q.weight")):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    fan_in = shape[-1]
    if name.endswith("modulation.weight"):
        assert settings.loop is not None
        small = settings.loop.start == "small"
        return torch.empty(shape).normal_(0.0, settings.init_std, generator=generator) if small else torch.zeros(shape)
    if name == "head.weight" and settings.mup_base_size is not None:
        std = math.sqrt(settings.mup_base_size) / fan_in
        return truncated_normal(shape, std, generator)
    if settings.init == "normal":
        return torch.empty(shape).normal_(0.0, settings.init_std, generator=generator)
    if name == "embed.weight":
        return torch.empty(shape).normal_(0.0, fan_in**-0.5, generator=generator)
    return truncated_normal(shape, fan_in**-0.5, generator)


def initial_value(name: str, shape: torch.Size, settings: DecoderSettings, seed: int) -> Tensor:
    """The initial values of one parameter, of which a rank may keep a part.

    Args:
        name: of the parameter.
        shape: of the whole.
        settings: of the decoder.
        seed: of the run.
    """
    chain, keys = _CHAIN.search(name), Keys.of_step(seed, 0).fold("initial weights")
    if chain is not None:
        # The first chain starts as a decoder of that chain alone does.
        name = _CHAIN.sub("", name)
        keys = keys.fold("chain").fold(int(chain[1])) if int(chain[1]) else keys
    values = _values(name, shape, settings, keys.fold(name).generator())
    if settings.loop is not None and settings.loop.start == "small" and _BACK.search(name):
        values *= (2 * settings.layers) ** -0.5
    return values


@torch.no_grad()
def fill_parameters(model: nn.Module, settings: DecoderSettings, seed: int) -> None:
    """Give every parameter its initial values.

    Norm scales are 1, biases 0, matrices (the last dimension is the fan-in) as `settings.init` says.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, settings, seed))
