"""Feed-forwards in tiles of tokens: the same numbers, and never all tokens at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.adapt.attach import attach
from resilin.adapt.settings import AdapterSettings
from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.tiled import in_tiles, tile_count

MOE = MoESettings(experts=4, expert_size=12, shared_size=8, shared_gate=True)
KINDS = [
    {},
    {"gated": False, "mlp_bias": True},
    {"moe": MOE},
    {"moe": MOE, "recompute": "block"},
    {"recompute": "selective"},
]


def run(model: Decoder, text: torch.Tensor, keys: Keys | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    out = model(text, keys=keys)
    total = out.hidden_BTD.square().sum() + sum(router.square().sum() for router in out.router_logits)
    total.backward()
    return out.hidden_BTD.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), rows=st.integers(1, 3), tokens=st.integers(1, 19), tiles=st.integers(2, 8))
def test_any_tiles_give_the_outputs_and_gradients_of_all_tokens_at_once(kind, rows, tokens, tiles):
    text = torch.arange(rows * tokens).view(rows, tokens) % 30
    both = []
    for count in (1, tiles):
        model = Decoder(
            DecoderSettings(vocab_size=30, hidden_size=16, layers=2, heads=2, init="fan_in", mlp_tiles=count, **kind),
            seed=2,
        ).double()
        both.append(run(model, text))
    (whole, gradients), (mine, found) = both
    torch.testing.assert_close(mine, whole, rtol=1e-9, atol=1e-12)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_float32_stays_within_rounding():
    text = torch.arange(600).view(2, 300) % 30
    (whole, gradients), (mine, found) = (
        run(Decoder(DecoderSettings(vocab_size=30, hidden_size=16, layers=2, heads=2, mlp_tiles=count), seed=2), text)
        for count in (1, 7)
    )
    torch.testing.assert_close(mine, whole, rtol=1e-6, atol=1e-6)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_no_tile_sees_more_tokens_than_its_share():
    seen = []
    model = Decoder(DecoderSettings(vocab_size=30, hidden_size=16, layers=1, heads=2, mlp_tiles=4), seed=2)
    model.blocks[0].mlp.down.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    run(model, torch.zeros(2, 11, dtype=torch.int64))
    assert seen == [3, 3, 3, 2] * 2  # forward, and again in the backward pass


def test_frozen_weights_and_inputs_without_gradients_have_none():
    layer = torch.nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    x = torch.randn(1, 6, 4)
    (out,) = in_tiles([layer], lambda rows: (layer(rows),), x, 3)
    out.sum().backward()
    assert layer.bias.grad is None
    torch.testing.assert_close(layer.weight.grad, x[0].sum(0).expand(4, 4))


def test_a_parameter_of_one_row_does_not_overwrite_the_gradient_it_was_given():
    class Shift(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(1, 3))

    module, x = Shift(), torch.ones(1, 4, 3, requires_grad=True)
    (out,) = in_tiles([module], lambda rows: (rows + module.shift,), x, 4)
    pull = torch.arange(12.0).view(1, 4, 3)
    out.backward(pull)
    assert torch.equal(x.grad, torch.arange(12.0).view(1, 4, 3))
    assert torch.equal(module.shift.grad, torch.arange(12.0).view(4, 3).sum(0, keepdim=True))


def test_a_second_derivative_is_that_of_all_tokens_at_once():
    layer = torch.nn.Linear(3, 3).double()
    x = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)

    def function(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (layer(rows).tanh(),)

    found = []
    for tiles in (1, 2):
        (out,) = in_tiles([layer], function, x, tiles)
        (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, layer.weight]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_of_adapters_is_drawn_as_without_tiles():
    text, keys = torch.arange(40).view(2, 20) % 30, Keys(0, 0, torch.arange(2))
    found = []
    for tiles in (1, 4):
        model = Decoder(DecoderSettings(vocab_size=30, hidden_size=16, layers=1, heads=2, mlp_tiles=tiles), seed=2)
        attach(model, {"default": AdapterSettings(method="lora", rank=2, dropout=0.5)})
        found.append(run(model, text, keys)[1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_auto_takes_about_as_many_tokens_as_they_are_wide():
    assert tile_count("auto", 1, 8192, 1024) == 8
    assert tile_count("auto", 2, 8193, 1024) == 17
    assert tile_count("auto", 1, 1000, 16) == 4
    assert tile_count(8, 5, 3, 16) == 3


@pytest.mark.parametrize("tiles", [2, "auto"])
def test_autocast_holds_in_the_backward_pass_too(tiles):
    layer, formats = torch.nn.Linear(8, 8), []
    x = torch.randn(1, 600, 8, requires_grad=True)

    def function(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = layer(rows)
        formats.append(out.dtype)
        return (out,)

    with torch.autocast("cpu", torch.bfloat16):
        (out,) = in_tiles([layer], function, x, tiles)
    out.sum().backward()
    assert len(formats) >= 4
    assert set(formats) == {torch.bfloat16}
