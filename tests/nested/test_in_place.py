"""A budget in place is the sub-model that is taken out, and touches nothing else."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nested_cases import TOKENS, cases, decoder

from resilin.layout import missing
from resilin.layout.region import Region
from resilin.models.cache import KVCache
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.flops import forward_flops_per_token, parameter_counts
from resilin.nested import Budget, budget, cost, extract, full, is_cut, regions, sub_settings
from resilin.nested.regions import shapes_of
from resilin.precision.compiled import compile_model

PLAIN = DecoderSettings(vocab_size=37, hidden_size=16, layers=3, heads=4, kv_heads=2, mlp_size=24, init_std=0.4)


def logits(model, tokens=TOKENS, **more):
    return model.logits(model(tokens, **more).hidden_BTD)


@settings(max_examples=60)
@given(cases())
def test_what_runs_in_place_is_what_is_taken_out(case):
    chosen, wanted = case
    model = decoder(chosen)
    small = extract(model, wanted)
    assert small.settings == sub_settings(chosen, wanted)
    with budget(model, wanted):
        inside = model(TOKENS)
        inside_logits = model.logits(inside.hidden_BTD)
    outside = small(TOKENS)
    torch.testing.assert_close(inside_logits, small.logits(outside.hidden_BTD), rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(inside.router_logits, outside.router_logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert inside.choices == outside.choices or not (inside.choices and outside.choices)


@settings(max_examples=40)
@given(cases())
def test_gradients_outside_the_regions_are_exactly_zero(case):
    chosen, wanted = case
    model = decoder(chosen)
    with budget(model, wanted):
        (logits(model) * torch.linspace(-1, 1, 37)).square().sum().backward()
    used = regions(chosen, wanted)
    for name, parameter in model.named_parameters():
        whole = Region.whole(parameter.shape)
        outside = missing(whole, used.get(name, ()))
        for box in outside:
            assert parameter.grad is None or not parameter.grad[box.slices].any(), name
        if name in used and ".moe." not in name and "attention." not in name:
            assert parameter.grad is not None


@settings(max_examples=40)
@given(cases())
def test_costs_are_those_of_the_model_that_is_taken_out(case):
    chosen, wanted = case
    small = extract(decoder(chosen), wanted)
    told = cost(chosen, wanted, sequence_length=12)
    assert told.parameters == sum(p.numel() for p in small.parameters())
    assert told.parameters == sum(box.numel for boxes in regions(chosen, wanted).values() for box in boxes)
    assert told.non_embedding == parameter_counts(small.settings).non_embedding
    assert told.flops == forward_flops_per_token(small.settings, 12)
    heads = sum(block.attention.key_heads for block in small.blocks)
    assert told.kv_bytes == 2 * 4 * heads * small.settings.head_width


@settings(max_examples=25)
@given(cases())
def test_with_a_cache_it_is_the_same(case):
    chosen, wanted = case
    model = decoder(chosen)
    with torch.no_grad(), budget(model, wanted):
        at_once, cache = logits(model), KVCache.of(model, 2, 8)
        parts = [logits(model, part, cache=cache) for part in (TOKENS[:, :4], TOKENS[:, 4:5], TOKENS[:, 5:])]
    torch.testing.assert_close(torch.cat(parts, 1), at_once, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("moe", [None, MoESettings(experts=4, experts_per_token=2, expert_size=24)])
def test_the_full_budget_is_the_plain_model_bit_for_bit(moe):
    model = decoder(PLAIN.model_copy(update={"moe": moe}), torch.float32)
    whole = logits(model)
    whole.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    for wanted in (Budget(), Budget(ffn=24), Budget(heads=4, kv_heads=2, hidden=16), Budget(ffn=(24, None, 24))):
        model.zero_grad(set_to_none=True)
        with budget(model, wanted):
            again = logits(model)
            again.sum().backward()
        assert torch.equal(whole, again)
        assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_fewer_neurons_are_a_mask_before_or_after_the_activation(activation):
    """All activations are 0 at 0, and either factor of a gated feed-forward may be masked."""
    for gated in (True, False):
        chosen = PLAIN.model_copy(update={"activation": activation, "gated": gated, "mlp_bias": True})
        model = decoder(chosen)
        with budget(model, Budget(ffn=7)):
            cut = logits(model)
        for where in ("after", "up", "gate"):
            masked = decoder(chosen)
            for block in masked.blocks:
                if where == "after":
                    block.mlp.down.register_forward_pre_hook(lambda _, args: (_first_seven(args[0]),))
                else:
                    factor = block.mlp.up if where == "up" or not gated else block.mlp.gate
                    factor.register_forward_hook(lambda _, __, out: _first_seven(out))
            torch.testing.assert_close(cut, logits(masked), rtol=1e-9, atol=1e-9)


def _first_seven(x):
    return torch.where(torch.arange(x.shape[-1]) < 7, x, 0.0)


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
@pytest.mark.parametrize("tiles", [1, 2])
def test_a_block_that_is_computed_again_is_cut_as_it_was(recompute, tiles):
    """Also where the backward pass runs after the budget, under another one."""
    wanted = Budget(ffn=(5, 24, 9), heads=2, skip=(1,))
    usual = decoder(PLAIN)
    with budget(usual, wanted):
        logits(usual).square().sum().backward()
    again = decoder(PLAIN.model_copy(update={"recompute": recompute, "mlp_tiles": tiles}))
    with budget(again, wanted):
        loss = logits(again).square().sum()
    with budget(again, Budget(ffn=3)):
        loss.backward()
    for (name, mine), (_, theirs) in zip(again.named_parameters(), usual.named_parameters(), strict=True):
        if mine.grad is None or theirs.grad is None:
            assert all(grad is None or not grad.any() for grad in (mine.grad, theirs.grad)), name
        else:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_inner_budgets_replace_outer_ones_and_end_by_exceptions():
    model = decoder(PLAIN)
    whole, small, smaller = logits(model), None, None
    with budget(model, Budget(ffn=8)):
        small = logits(model)
        with budget(model, Budget(ffn=4)):
            smaller = logits(model)
        with full(model):
            assert torch.equal(logits(model), whole)
            assert not is_cut(model)
        with pytest.raises(ZeroDivisionError), budget(model, Budget(ffn=2)):
            1 / 0
        assert torch.equal(logits(model), small)
    assert torch.equal(logits(model), whole)
    assert not torch.equal(small, smaller)


def test_each_thread_has_its_own_budget_and_each_model():
    model, other = decoder(PLAIN), decoder(PLAIN)
    wanted = [Budget(ffn=n) for n in (2, 8, 24)]
    alone = []
    for one in wanted:
        with torch.no_grad(), budget(model, one):
            alone.append(logits(model))
    found, start = {}, threading.Barrier(3)

    def run(number):
        with torch.no_grad(), budget(model, wanted[number]):
            start.wait()
            found[number] = [logits(model) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, alone[n]) for n in range(3) for one in found[n])
    with budget(model, wanted[0]):
        assert is_cut(model)
        assert not is_cut(other)


def test_no_weights_are_copied():
    """In a run at a tenth of the width no tensor as large as a weight of the feed-forward is made."""
    chosen = PLAIN.model_copy(update={"mlp_size": 4000, "hidden_size": 16})
    model = decoder(chosen, torch.float32)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in weights:
                made.append(out.numel())
            return out

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.no_grad(), budget(model, Budget(ffn=400, heads=2)), Watch():
        model(TOKENS[:1])
    assert 7 * 400 <= max(made) < 400 * 16  # what seven tokens make of 400 neurons


@given(st.integers(1, 24), st.integers(1, 24))
@settings(max_examples=20)
def test_smaller_budgets_lie_inside_larger_ones(one, two):
    small, large = sorted((one, two))
    inner, outer = regions(PLAIN, Budget(ffn=small)), regions(PLAIN, Budget(ffn=large))
    assert all(all(any(box in other for other in outer[name]) for box in boxes) for name, boxes in inner.items())
    assert set(shapes_of(PLAIN)) == set(inner)


@pytest.mark.parametrize("what", ["blocks", pytest.param("whole", marks=pytest.mark.slow)])
def test_compiled_models_run_budgets_too(what):
    torch.compiler.reset()
    model = decoder(PLAIN, torch.float32)
    expected = []
    for wanted in (Budget(), Budget(ffn=8, skip=(1,)), Budget(ffn=(4, 8, 24), heads=2)):
        with budget(model, wanted):
            expected.append(
                (wanted, logits(model), torch.autograd.grad(logits(model).square().sum(), model.norm.weight))
            )
    whole = compile_model(model, "blocks" if what == "blocks" else True, "default", backend="aot_eager")
    compiled = model if whole is None else whole
    for wanted, told, grads in expected:
        with budget(compiled, wanted):
            again = model.logits(compiled(TOKENS).hidden_BTD)
            pulled = torch.autograd.grad(again.square().sum(), model.norm.weight)
        torch.testing.assert_close(again, told, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pulled, grads, rtol=1e-3, atol=1e-3)


def test_after_a_budget_the_whole_model_compiles_into_one_graph():
    torch.compiler.reset()
    model = decoder(PLAIN, torch.float32)
    with budget(model, Budget(ffn=8)):
        logits(model)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(TOKENS).hidden_BTD, model(TOKENS).hidden_BTD
    )
