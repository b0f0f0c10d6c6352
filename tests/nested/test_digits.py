"""The method's small experiment on handwritten digits: a model of one's own, nested with the decoder's own parts."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resilin.keys import Keys
from resilin.layout import Region
from resilin.models.cut import BlockCut, Cut, cut_of, running
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.initial import fill_parameters
from resilin.models.linear import Linear
from resilin.models.mlp import MLP
from resilin.nested.objective import Nested

pytest.importorskip("sklearn")

WIDTHS, HIDDEN, LAYERS, STEPS, ROWS = (8, 16, 32, 64), 32, 4, 1500, 64


class Residual(nn.Module):
    """Pre-norm feed-forwards around a stream; it asks for its cut, and hands each block its part."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        settings = DecoderSettings(
            hidden_size=HIDDEN, heads=1, gated=False, activation="gelu", init="fan_in", mlp_bias=True
        )
        self.first = Linear(64, HIDDEN)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(LAYERS))
        self.mlps = nn.ModuleList(MLP(settings, width) for _ in range(LAYERS))
        self.head = Linear(HIDDEN, 10)
        fill_parameters(self, settings, seed)

    def forward(self, x):
        cut, x = cut_of(self), self.first(x)
        for layer, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True)):
            x = x + mlp(norm(x), None if cut is None else cut.blocks[layer])
        return self.head(x)


def cut_at(width):
    if width == WIDTHS[-1]:
        return None
    rows, columns = Region((0, 0), (width, HIDDEN)), Region((0, 0), (HIDDEN, width))
    used = {"mlp.up.weight": (rows,), "mlp.up.bias": (Region((0,), (width,)),), "mlp.down.weight": (columns,)}
    return Cut(HIDDEN, (BlockCut(used, HIDDEN, 1, 1),) * LAYERS)


def digits():
    from resilin.vision.digits import digits_file

    table = np.loadtxt(gzip.decompress(digits_file().read_bytes()).decode().splitlines(), delimiter=",", dtype=np.int64)
    order = np.random.default_rng(0).permutation(len(table))
    x, y = torch.tensor(table[order, :-1] / 16, dtype=torch.float32), torch.tensor(table[order, -1])
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def train(model, data, steps, seed, width_of):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        chosen = torch.randint(0, 1200, (ROWS,), generator=Keys.of_step(seed, step).fold("rows").generator())
        optimizer.zero_grad(set_to_none=True)
        with running(model, cut_at(width_of(step))):
            loss = F.cross_entropy(model(data[0][chosen]), data[1][chosen])
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def at(model, width, data):
    with running(model, cut_at(width)):
        logits = model(data[0])
    return float(F.cross_entropy(logits, data[1])), logits.argmax(-1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1])
def test_digits_show_what_the_method_promises(seed):
    data, held_out = digits()
    draws = Nested().build()
    nested = train(Residual(64, seed), data, 4 * STEPS, seed, lambda step: WIDTHS[draws.drawn_at(seed, step)])
    plain = train(Residual(64, seed), data, STEPS, seed, lambda _: 64)
    small = train(Residual(8, seed), data, STEPS, seed, lambda _: 64)
    accuracy = {width: float((at(nested, width, held_out)[1] == held_out[1]).float().mean()) for width in WIDTHS}
    whole = float((at(plain, 64, held_out)[1] == held_out[1]).float().mean())
    assert at(plain, 8, held_out)[0] > 3 * at(nested, 8, held_out)[0]
    assert min(accuracy.values()) > whole - 0.02

    def agreement(one, two):
        return float((one == two).float().mean())

    inside = agreement(at(nested, 8, held_out)[1], at(nested, 64, held_out)[1])
    apart = agreement(at(small, 64, held_out)[1], at(plain, 64, held_out)[1])
    assert inside > apart
