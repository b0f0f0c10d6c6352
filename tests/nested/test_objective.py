"""Nested training: which sizes a step computes, and that nobody can tell how the batch was split."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from nested_cases import decoder
from pydantic import ValidationError
from split_steps import SEED, batch_of, check_micro_batches, check_two_workers, keys_at

from resilin.config import parse_settings
from resilin.layout import missing
from resilin.layout.region import Region
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.nested import Budget, BudgetError, budget, regions
from resilin.nested.objective import Nested
from resilin.objective.next_token import NextToken

SIZES = DecoderSettings(vocab_size=37, hidden_size=16, layers=2, heads=4, kv_heads=2, mlp_size=32, init_std=0.2)


def gradients(model, objective, keys, batch=None):
    model.zero_grad(set_to_none=True)
    batch = batch_of(range(4)) if batch is None else batch
    loss = objective(model, batch, keys)
    loss.sum.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def test_sizes_are_drawn_by_seed_and_step_alone_and_as_often_as_asked():
    objective = Nested(probabilities=(4, 3, 2, 1)).build()
    drawn = [objective.drawn_at(0, step) for step in range(2000)]
    shares = [Counter(drawn)[number] / 2000 for number in range(4)]
    assert shares == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.04)
    assert drawn == [objective.drawn_at(0, step) for step in range(2000)]
    assert drawn != [objective.drawn_at(1, step) for step in range(2000)]
    never = Nested(probabilities=(0, 1, 0, 1)).build()
    assert {never.drawn_at(0, step) for step in range(200)} == {1, 3}


@pytest.mark.parametrize("targets", [("ffn",), ("ffn", "heads"), ("heads",)])
def test_a_sampled_step_is_its_size_alone_and_leaves_the_rest_at_zero(targets):
    chosen = SIZES.model_copy(update={"kv_heads": 4}) if targets != ("ffn",) else SIZES
    objective, model = Nested(granularities=(0.25, 0.5, 1), targets=targets).build(), decoder(chosen)
    seen = set()
    for step in range(12):
        number = objective.drawn_at(SEED, step)
        seen.add(number)
        loss, found = gradients(model, objective, keys_at(step))
        wanted = objective.budgets(model)[number]
        with budget(model, wanted):
            alone, expected = gradients(model, objective.inner, keys_at(step))
        assert torch.equal(loss.sum, alone.sum)
        used = regions(chosen, wanted)
        for name, grad in found.items():
            assert torch.equal(grad, expected[name])
            for box in missing(Region.whole(grad.shape), used[name]):
                assert not grad[box.slices].any()
        assert set(loss.logs) - set(alone.logs) == {f"loss_at_{objective.nest.granularities[number]:g}"}
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("mode", ["joint-sum", "joint-mean"])
@pytest.mark.parametrize("moe", [None, MoESettings(experts=4, experts_per_token=2, expert_size=32)])
def test_joint_gradients_are_the_sum_or_mean_of_the_single_ones(mode, moe):
    model = decoder(SIZES.model_copy(update={"moe": moe}))
    objective = Nested(mode=mode).build()
    loss, found = gradients(model, objective, keys_at(0))
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    sums = 0.0
    for wanted in objective.budgets(model):
        with budget(model, wanted):
            alone, grads = gradients(model, objective.inner, keys_at(0))
        sums += float(alone.sum.detach())
        for name, grad in grads.items():
            total[name] += grad
    scale = 4 if mode == "joint-mean" else 1
    assert float(loss.sum.detach()) == pytest.approx(sums / scale)
    for name, grad in found.items():
        torch.testing.assert_close(grad, total[name] / scale, rtol=1e-9, atol=1e-9)


def test_one_granularity_is_ordinary_training_bit_for_bit():
    for mode in ("sample", "joint-sum", "joint-mean", "per-layer"):
        model = decoder(SIZES, torch.float32)
        plain, expected = gradients(model, NextToken().build(), keys_at(0))
        loss, found = gradients(model, Nested(granularities=(1,), mode=mode).build(), keys_at(0))
        assert torch.equal(loss.sum, plain.sum)
        assert all(torch.equal(found[name], grad) for name, grad in expected.items())
        assert loss.logs.keys() == plain.logs.keys()


def test_per_layer_draws_a_size_for_each_layer():
    model, objective = decoder(SIZES), Nested(granularities=(0.25, 1), mode="per-layer").build()
    patterns = set()
    for step in range(40):
        _, found = gradients(model, objective, keys_at(step))
        patterns.add(tuple(bool(found[f"blocks.{layer}.mlp.up.weight"][8:].any()) for layer in range(2)))
    assert patterns == {(False, False), (False, True), (True, False), (True, True)}


@pytest.mark.parametrize("mode", ["sample", "joint-sum", "per-layer"])
def test_micro_batches_change_nothing(mode):
    check_micro_batches(lambda: decoder(SIZES), Nested(mode=mode).build())


@pytest.mark.parametrize("mode", ["sample", "joint-sum", "per-layer"])
def test_two_workers_give_the_bits_of_one(mode):
    check_two_workers(SIZES, Nested(mode=mode), 6)


def test_evaluation_reads_all_sizes_and_gives_the_whole_model_s_loss():
    model, objective = decoder(SIZES), Nested().build()
    with torch.no_grad():
        told, whole = objective(model, batch_of(range(4)), None), objective.inner(model, batch_of(range(4)), None)
        assert torch.equal(told.sum, whole.sum)
        for label, wanted in zip(("0.125", "0.25", "0.5", "1"), objective.budgets(model), strict=True):
            with budget(model, wanted):
                alone = objective.inner(model, batch_of(range(4)), None)
            assert told.logs[f"loss_at_{label}"].value() == pytest.approx(float(alone.sum / alone.units))
        assert Nested(evaluate_all=False).build()(model, batch_of(range(4)), None).logs.keys() == whole.logs.keys()


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"granularities": []}, "is empty"),
        ({"granularities": [0.5, 0.25, 1]}, "should ascend"),
        ({"granularities": [0.5]}, "the last one should be 1"),
        ({"granularities": [0.5, 64]}, "mixes shares"),
        ({"granularities": [1.5, 2]}, "whole numbers"),
        ({"granularities": [0, 1]}, "expected shares"),
        ({"probabilities": [1]}, "1 entries for 4"),
        ({"probabilities": [0, 0, 0, 0]}, "all 0"),
        ({"probabilities": [1, 1, 1, 1], "mode": "joint-sum"}, "computes all sizes"),
        ({"targets": []}, "expected 'ffn'"),
        ({"granularities": [8, 32], "targets": ["heads"]}, "numbers of neurons"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tree, says):
    with pytest.raises((ValidationError, ValueError), match=says):
        parse_settings(Nested, tree, "x.toml")


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"granularities": [0.3, 1]}, "0.3 of the 32 neurons of layer 0 is 9.6, no whole number: use 0.28125"),
        ({"granularities": [0.125, 1], "targets": ["heads"]}, "query heads of layer 0 is 0.5"),
        ({"granularities": [0.25, 1], "targets": ["heads"]}, "which its 2 key heads cannot share equally"),
        ({"granularities": [8, 16]}, "layer 0 has 32 neurons: the last one is the whole model, 32"),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_refused(tree, says):
    objective = parse_settings(Nested, tree, "x.toml").build()
    with pytest.raises(BudgetError, match=says):
        objective.budgets(decoder(SIZES))


def test_numbers_of_neurons_are_the_same_sizes_as_shares():
    model = decoder(SIZES)
    shares = Nested(granularities=(0.25, 1)).build().budgets(model)
    assert Nested(granularities=(8, 32)).build().budgets(model) == shares == (Budget(ffn=8), Budget())
