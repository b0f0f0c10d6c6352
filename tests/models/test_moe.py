from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.models import expert_products
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.initial import fill_parameters
from resilin.models.moe import MoE, route


def build(moe: MoESettings, gated: bool = True) -> MoE:
    whole = DecoderSettings(hidden_size=16, heads=2, gated=gated, moe=moe, init="fan_in")
    module = MoE(whole, moe)
    fill_parameters(module, whole, 3)
    return module.double()


def plain(module: MoE, x_ND, moe: MoESettings):
    """Token by token, expert by expert."""
    rows = []
    for x in x_ND:
        logits = module.router.weight @ x
        if moe.routing == "topk_softmax":
            top = logits.topk(moe.experts_per_token)
            weights, chosen = top.values.softmax(0), top.indices
        else:
            top = logits.softmax(0).topk(moe.experts_per_token)
            weights, chosen = top.values, top.indices
            if moe.normalise_weights:
                weights = weights / weights.sum()
        out = torch.zeros_like(x)
        for weight, e in zip(weights, chosen, strict=True):
            up = module.experts.up[e] @ x
            hidden = F.silu(up) if module.experts.gate is None else F.silu(module.experts.gate[e] @ x) * up
            out = out + weight * (module.experts.down[e] @ hidden)
        if module.shared is not None:
            shared = module.shared(x)
            out = out + (shared if module.shared_gate is None else torch.sigmoid(module.shared_gate(x)) * shared)
        rows.append(out)
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(
    experts=st.integers(1, 7),
    k=st.integers(1, 7),
    tokens=st.integers(1, 9),
    routing=st.sampled_from(["softmax_topk", "topk_softmax"]),
    normalise=st.booleans(),
    shared=st.sampled_from([(0, False), (6, False), (6, True)]),
    gated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_are_those_of_visiting_every_expert_in_turn(
    experts, k, tokens, routing, normalise, shared, gated, seed
):
    moe = MoESettings(
        experts=experts,
        experts_per_token=min(k, experts),
        expert_size=10,
        routing=routing,
        normalise_weights=normalise,
        shared_size=shared[0],
        shared_gate=shared[1],
    )
    module = build(moe, gated)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    pull = torch.randn(1, tokens, 16, dtype=torch.float64, generator=generator)
    # An expert that no token visits has no gradient in the plain version, and zeros in ours.
    inputs = [x, *module.parameters()]
    out, router = module(x)
    want = plain(module, x[0], moe)[None]
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
    assert router.shape == (1, tokens, experts)
    mine = torch.autograd.grad(out, inputs, pull, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(want, inputs, pull, allow_unused=True, materialize_grads=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_no_token_is_dropped_when_all_want_the_same_expert():
    moe = MoESettings(experts=8, experts_per_token=1, expert_size=10)
    module = build(moe)
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[5] = 1.0
    x = torch.rand(2, 30, 16, dtype=torch.float64)
    out, _ = module(x)
    torch.testing.assert_close(out, plain(module, x.flatten(0, 1), moe).view_as(x))
    assert (out.norm(dim=-1) > 0).all()


def test_weights_of_chosen_experts_sum_to_one_when_normalised():
    logits = torch.randn(50, 6)
    for routing in ("softmax_topk", "topk_softmax"):
        weights, chosen = route(logits, MoESettings(experts=6, experts_per_token=3, routing=routing))
        torch.testing.assert_close(weights.sum(-1), torch.ones(50))
        assert all(len(set(row)) == 3 for row in chosen.tolist())
    loose, _ = route(logits, MoESettings(experts=6, experts_per_token=3, normalise_weights=False))
    assert (loose.sum(-1) < 1).all()


def pulled(moe: MoE, x_ND, chosen_Nk):
    """Output, and gradients of tokens, weights and matrices."""
    x_ND = x_ND.clone().requires_grad_()
    weights_Nk = torch.linspace(0.1, 0.9, chosen_Nk.numel(), dtype=x_ND.dtype).view(chosen_Nk.shape).requires_grad_()
    out = moe.experts(x_ND, weights_Nk, chosen_Nk)
    inputs = [x_ND, weights_Nk, *moe.experts.parameters()]
    return [out, *torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))]


@settings(max_examples=15, deadline=None)
@given(chunk=st.integers(1, 9), gated=st.booleans(), seed=st.integers(0, 99))
def test_rows_pass_through_in_blocks_of_any_size(chunk, gated, seed):
    module = build(MoESettings(experts=6, experts_per_token=2, expert_size=10), gated)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(23, 16, dtype=torch.float64, generator=generator)
    chosen = torch.rand(23, 5, generator=generator).argsort(1)[:, :2]  # nobody wants the last expert
    want = pulled(module, x, chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_products, "CHUNK", chunk)
        got = pulled(module, x, chosen)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_an_expert_gives_the_same_bits_whichever_others_are_there():
    moe = MoESettings(experts=6, experts_per_token=1, expert_size=24)
    module = build(moe).float()
    generator = torch.Generator().manual_seed(0)
    # With 700 rows it goes through in two blocks; the other ones share one.
    chosen = torch.tensor([3] * 700 + [0, 1, 2, 4, 5] * 20)[torch.randperm(800, generator=generator), None]
    x = torch.randn(800, 16, generator=generator)
    together = pulled(module, x, chosen)
    for expert in range(6):
        alone, mine = build(moe).float(), chosen[:, 0] == expert
        with torch.no_grad():
            for mirror, matrix in zip(alone.experts.parameters(), module.experts.parameters(), strict=True):
                mirror.copy_(matrix)
        x_ND = x[mine].clone().requires_grad_()
        weights = torch.linspace(0.1, 0.9, 800)[mine, None]
        out = alone.experts(x_ND, weights, chosen[mine])
        pull = torch.linspace(-1, 1, 800 * 16).view(800, 16)[mine]
        got = torch.autograd.grad(out, [x_ND, *alone.experts.parameters()], pull)
        assert torch.equal(out, together[0][mine])
        assert torch.equal(got[0], together[1][mine])
        for a, b in zip(got[1:], together[3:], strict=True):
            assert torch.equal(a[expert], b[expert])


def test_the_gradient_has_a_gradient():
    module = build(MoESettings(experts=3, experts_per_token=2, expert_size=4))
    x = torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
    out, _ = module(x)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.abs().sum() > 0


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (
            {"experts": 2, "experts_per_token": 3},
            "larger than the number of experts \\(2\\)",
        ),
        ({"shared_gate": True}, "set shared_size"),
    ],
)
def test_impossible_mixtures_are_refused(moe, message):
    with pytest.raises(ValueError, match=message):
        MoESettings(**moe)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_grouped_kernel_gives_what_one_product_per_expert_gives():
    moe = MoESettings(experts=8, experts_per_token=2, expert_size=64)
    whole = DecoderSettings(hidden_size=128, heads=2, moe=moe, init="fan_in")
    module = MoE(whole, moe)
    fill_parameters(module, whole, 0)
    x = torch.randn(2, 100, 128)
    want, _ = module(x)
    got, _ = module.to("cuda", torch.bfloat16)(x.to("cuda", torch.bfloat16))
    torch.testing.assert_close(got.float().cpu(), want, atol=0.05, rtol=0.05)
