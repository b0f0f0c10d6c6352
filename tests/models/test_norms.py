from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.norm import LayerNorm, RMSNorm, Transplant, head_norm
from resilin.models.rms_norm import rms_norm, rms_norm_of_parts


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 7), width=st.integers(1, 33), seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 1.0, 1e3])
)
def test_our_rms_norm_and_its_gradients_are_torchs(rows, width, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, rows, width, generator=generator, dtype=torch.float64) * scale).requires_grad_()
    weight = torch.randn(width, generator=generator, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    mine, theirs = rms_norm(x, weight, 1e-5), F.rms_norm(x, (width,), weight, 1e-5)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(mine, (x, weight), pull), torch.autograd.grad(theirs, (x, weight), pull), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_rms_norm_has_right_first_and_second_derivatives():
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, w: rms_norm(a, w, 1e-3), (x, weight))
    assert torch.autograd.gradgradcheck(lambda a, w: rms_norm(a, w, 1e-3), (x, weight))


def test_a_frozen_scale_gets_no_gradient_and_the_input_still_does():
    x = torch.randn(3, 4, requires_grad=True)
    rms_norm(x, torch.ones(4), 1e-5).sum().backward()
    assert x.grad is not None
    weight = torch.ones(4, requires_grad=True)
    rms_norm(torch.randn(3, 4), weight, 1e-5).sum().backward()
    assert weight.grad is not None


def test_the_gradient_of_a_norm_is_the_closed_formula_and_shrinks_with_the_size_of_its_input():
    # grad_x = m**-1/2 (a g - x <g, a x> / (n m)), m = mean(x**2) + eps (Wortsman et al., 2023)
    torch.manual_seed(1)
    n, eps = 12, 1e-6
    scale, pull = torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    centred = torch.randn(n, dtype=torch.float64)
    centred -= centred.mean()
    sizes = []
    for kind in (RMSNorm, LayerNorm):
        module = kind(n, eps).double()
        with torch.no_grad():
            module.weight.copy_(scale)
        for factor in (1.0, 100.0):
            x = (centred * factor).requires_grad_()
            (got,) = torch.autograd.grad(module(x), x, pull)
            m = (x.detach() ** 2).mean() + eps
            want = m**-0.5 * (scale * pull - x.detach() * (pull @ (scale * x.detach())) / (n * m))
            if kind is LayerNorm:  # which also removes the mean
                want = want - want.mean()
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
            sizes.append(float(got.norm()))
    assert sizes[0] / sizes[1] == pytest.approx(100, rel=1e-3)
    assert sizes[2] / sizes[3] == pytest.approx(100, rel=1e-3)


def test_a_transplant_gives_every_head_the_root_mean_square_sqrt_kappa():
    x = torch.randn(2, 3, 4, 16) * torch.tensor([1e-2, 1.0, 1e3])[None, :, None, None]
    for kappa in (1.0, 1e3, 1e4):
        rms = Transplant(kappa, 1e-12)(x).square().mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, math.sqrt(kappa)), rtol=1e-4, atol=0)


def test_head_norms_share_one_scale_among_all_heads():
    for kind in ("rms", "layer"):
        norm = head_norm(DecoderSettings(hidden_size=64, heads=4, qk_norm=kind), 4, None)
        assert [tuple(p.shape) for p in norm.parameters()] == [(16,)]
    assert head_norm(DecoderSettings(), 4, None) is None


def test_norms_over_the_width_have_a_scale_for_every_value_of_the_queries_and_of_the_fewer_keys():
    settings = DecoderSettings(hidden_size=64, heads=4, kv_heads=2, qk_norm="layer", qk_norm_over="width")
    assert [tuple(head_norm(settings, heads, None).weight.shape) for heads in (4, 2)] == [(64,), (32,)]


def test_norms_of_parts_are_those_of_each_part():
    """To the bit, with their gradients and the gradients of these."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(n, generator=generator, dtype=torch.float64, requires_grad=True) for n in (2, 1, 4)]
    pull = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    whole = rms_norm_of_parts(x, weights, 1e-5)
    each = torch.cat([rms_norm(p, w, 1e-5) for p, w in zip(x.split([2, 1, 4], -1), weights, strict=True)], -1)
    assert torch.equal(whole, each)
    for mine, theirs in zip(*(torch.autograd.grad(y, [x, *weights], pull) for y in (whole, each)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradgradcheck(lambda x, *w: rms_norm_of_parts(x, w, 1e-5), (x, *weights))
    with torch.no_grad():
        assert torch.equal(rms_norm_of_parts(x, weights, 1e-5), whole)
