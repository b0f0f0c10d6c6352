from __future__ import annotations

import pytest
import torch
from offline import one_thread
from torch import nn

from resilin.adapt.attach import adapter_parameters, attach
from resilin.adapt.settings import AdapterSettings
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings

__all__ = ["one_thread"]


class One(nn.Module):
    """A single linear map called `map`."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> None:
        super().__init__()
        self.map = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x)


def adapter_settings(method: str, rank: int = 4, **more) -> AdapterSettings:
    if method == "mini":
        more.setdefault("mini_rank", 4)
    return AdapterSettings(method=method, rank=rank, **more)


def make_one(
    method: str, inputs: int = 12, outputs: int = 8, rank: int = 4, dtype=torch.float64, moved=0.0, **more
) -> One:
    """A linear map with an adapter whose parameters are moved from the identity by normal numbers times `moved`."""
    torch.manual_seed(inputs * 100 + outputs)
    model = One(inputs, outputs, dtype)
    attach(model, {"a": adapter_settings(method, rank, **more)}, seed=1)
    move_adapters(model, moved)
    return model


def move_adapters(model: nn.Module, by: float, name: str | None = None) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, name):
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(by * drawn.to(parameter.dtype))


@pytest.fixture
def one():
    """A linear map called `map` with one adapter `a`."""
    return make_one


@pytest.fixture
def settings():
    return adapter_settings


@pytest.fixture
def move():
    """Moves adapters away from the identity."""
    return move_adapters


@pytest.fixture
def decoder():
    """A small decoder with grouped heads and biases, with adapters attached as asked."""

    def make(adapters: dict | None = None, **changes) -> Decoder:
        sizes = {"vocab_size": 40, "hidden_size": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_size": 24}
        model = Decoder(DecoderSettings(**{**sizes, "init_std": 0.3, **changes}), seed=3)
        if adapters is not None:
            attach(model, adapters, seed=5)
        return model

    return make
