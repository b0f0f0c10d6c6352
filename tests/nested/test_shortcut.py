"""Shortcut consistency: which trajectory a step draws, what it learns, and that nobody can tell how it was split."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from split_steps import SEED, T, batch_of, check_micro_batches, check_two_workers, keys_at

from resilin.config import parse_settings
from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.loop_settings import LoopSettings
from resilin.nested import Budget, BudgetError, budget
from resilin.nested.loop_record import LoopRecord
from resilin.nested.shortcut import Shortcut
from resilin.nested.trajectories import compositions, sequential, uniform
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken

L = 4


def sizes(**loop) -> DecoderSettings:
    return DecoderSettings(
        vocab_size=37, hidden_size=16, layers=1, heads=4, kv_heads=2, mlp_size=32, init_std=0.2,
        loop=LoopSettings(**{"times": L, "start": "small", **loop}),
    )  # fmt: skip


def model_of(dtype=torch.float64, **loop) -> Decoder:
    return Decoder(sizes(**loop), seed=3).to(dtype)


def gradients(model, objective, keys, batch=None):
    model.zero_grad(set_to_none=True)
    loss = objective(model, batch_of(range(4)) if batch is None else batch, keys)
    loss.sum.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10**6), st.sampled_from([sequential, uniform]))
def test_short_trajectories_are_compositions(whole, step, draw):
    keys = Keys.of_step(0, step)
    loops = 1 + keys.integer(whole - 1)
    steps = draw(keys, loops, whole)
    assert len(steps) == loops < whole
    assert sum(steps) == whole
    assert min(steps) > 0
    assert draw(keys, loops, whole) == steps


@pytest.mark.parametrize("sampler", ["sequential", pytest.param("uniform", marks=pytest.mark.slow)])
def test_trajectories_are_as_probable_as_the_paper_s_code_makes_them(sampler):
    objective, count = Shortcut(sampler=sampler).build(), 6000
    drawn = Counter(objective.drawn_at(SEED, step, 4) for step in range(count))
    third = Fraction(1, 3)
    if sampler == "sequential":
        of_three = {(1, 1, 2): third / 4, (1, 2, 1): third / 4, (2, 1, 1): third / 2}
    else:
        of_three = dict.fromkeys([(1, 1, 2), (1, 2, 1), (2, 1, 1)], third / 3)
    expected = {(4,): third, (1, 3): third / 3, (2, 2): third / 3, (3, 1): third / 3, **of_three}
    assert {steps: n / count for steps, n in drawn.items()} == pytest.approx(
        {steps: float(share) for steps, share in expected.items()}, abs=0.02
    )
    assert [objective.drawn_at(1, step, 4) for step in range(20)] != [
        objective.drawn_at(2, step, 4) for step in range(20)
    ]


def test_all_compositions_are_listed_once():
    for whole, loops in itertools.product(range(1, 7), range(1, 7)):
        found = list(compositions(loops, whole))
        brute = [c for c in itertools.product(range(1, whole + 1), repeat=loops) if sum(c) == whole]
        assert sorted(found) == brute
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("condition", ["time_and_step", "index", "none"])
def test_the_loss_is_its_three_parts(condition):
    model, objective = model_of(condition=condition), Shortcut(short_weight=0.3, consistency_weight=0.7).build()
    plain, seen = NextToken().build(), set()
    for step in range(6):
        loops = objective.drawn_at(SEED, step, L)
        seen.add(len(loops))
        wanted = Budget(loops=loops if condition == "time_and_step" else len(loops))
        batch = batch_of(range(4))
        loss = objective(model, batch, keys_at(step))
        full, h_full = plain(model, batch, None), model(batch["tokens"]).hidden_BTD
        with budget(model, wanted):
            short, h_short = plain(model, batch, None), model(batch["tokens"]).hidden_BTD
        distance = (h_short - h_full).square().mean(-1).sum()
        torch.testing.assert_close(loss.sum, full.sum + 0.3 * short.sum + 0.7 * distance)
        assert loss.units == full.units
        assert loss.logs["loss_full"].value() == pytest.approx(float(full.sum / full.units))
        assert loss.logs["loss_short"].value() == pytest.approx(float(short.sum / short.units))
        mean = (h_short - h_full).square().mean()
        assert loss.logs["consistency"].value() == pytest.approx(float(mean))
        assert loss.logs["consistency_relative"].value() == pytest.approx(float(mean / h_full.square().mean()))
        assert loss.logs["loops"].value() == len(loops)
    assert len(seen) > 1


@pytest.mark.parametrize("target", ["hidden", "logits"])
def test_no_gradient_of_the_distance_reaches_the_full_trajectory(target):
    """The gradient is that of the same sum with the full states given as numbers."""
    model = model_of()
    objective = Shortcut(short_weight=0.0, consistency_weight=0.5, target=target).build()
    loops, batch = objective.drawn_at(SEED, 1, L), batch_of(range(4))
    with torch.no_grad():
        h_full = model(batch["tokens"]).hidden_BTD
        p_full = model.logits(h_full).log_softmax(-1)
    _, found = gradients(model, objective, keys_at(1))
    model.zero_grad(set_to_none=True)
    full = NextToken().build()(model, batch, None).sum
    with budget(model, Budget(loops=loops)):
        h_short = model(batch["tokens"]).hidden_BTD
        if target == "hidden":
            distance = (h_short - h_full).square().mean(-1).sum()
        else:
            distance = (p_full.exp() * (p_full - model.logits(h_short).log_softmax(-1))).sum()
    (full + 0.5 * distance).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("condition", ["time_and_step", "none"])
def test_without_weights_it_is_ordinary_training_bit_for_bit(condition):
    model = model_of(torch.float32, condition=condition)
    plain, expected = gradients(model, NextToken().build(), keys_at(0))
    objective = Shortcut(short_weight=0.0, consistency_weight=0.0).build()
    loss, found = gradients(model, objective, keys_at(0))
    assert torch.equal(loss.sum, plain.sum)
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    assert loss.logs.keys() == plain.logs.keys()


def test_masked_places_and_weights_count_as_in_the_objective():
    model, batch = model_of(), batch_of(range(4))
    labels = batch["labels"].clone()
    labels[:, :3] = -100
    labels[1] = -100
    weights = torch.rand(4, T, dtype=torch.float64)
    given_ = Batch(batch.slots_B, {**batch.fields, "labels": labels, "weights": weights})
    objective = Shortcut(short_weight=0.0, consistency_weight=1.0).build()
    loss = objective(model, given_, keys_at(2))
    with torch.no_grad():
        h_full = model(batch["tokens"]).hidden_BTD
        with budget(model, Budget(loops=objective.drawn_at(SEED, 2, L))):
            error = (model(batch["tokens"]).hidden_BTD - h_full).square().mean(-1)
    valid = labels != -100
    expected = NextToken().build()(model, given_, None).sum + (error * weights)[valid].sum()
    torch.testing.assert_close(loss.sum, expected)


def test_dropout_of_the_full_pass_is_that_of_ordinary_training():
    chosen = sizes().model_copy(update={"dropout": 0.3})
    model = Decoder(chosen, seed=3).double()
    plain = NextToken().build()(model, batch_of(range(4)), keys_at(0))
    loss = Shortcut().build()(model, batch_of(range(4)), keys_at(0))
    assert loss.logs["loss_full"].value() == float(plain.sum.detach() / plain.units)


def test_micro_batches_change_nothing():
    check_micro_batches(model_of, Shortcut().build())


def test_two_workers_give_the_bits_of_one():
    check_two_workers(sizes(), Shortcut(), 5)


def test_held_out_data_is_read_at_every_number_of_loops():
    model, batch = model_of(), batch_of(range(4))
    chosen = Shortcut(evaluated=(1, 2, 6, (2, 1, 1)))
    with torch.no_grad():
        told = Shortcut().build()(model, batch, None)
        whole = NextToken().build()(model, batch, None)
        assert torch.equal(told.sum, whole.sum)
        assert told.logs.keys() - whole.logs.keys() == {f"loss_at_{m}" for m in range(1, L + 1)}
        more = chosen.build()(model, batch, None)
        assert more.logs.keys() - whole.logs.keys() == {f"loss_at_{m}" for m in ("1", "2", "6", "2+1+1", "4")}
        for label, wanted in (("2", Budget(loops=2)), ("6", Budget(loops=6)), ("2+1+1", Budget(loops=(2, 1, 1)))):
            with budget(model, wanted):
                alone = NextToken().build()(model, batch, None)
            assert more.logs[f"loss_at_{label}"].value() == pytest.approx(float(alone.sum / alone.units))


def test_which_trajectories_count_as_trained():
    chosen, record = sizes(), LoopRecord.of(Shortcut())
    kinds = {one: record.kind(chosen, Budget(loops=one)) for one in (1, 2, 3, 4, 5, (3, 1), (1, 2, 1), (2, 1))}
    assert kinds == {
        1: "trained", 2: "trained", 3: "mix", 4: "trained", 5: "untrained", (3, 1): "trained", (1, 2, 1): "trained",
        (2, 1): "mix",
    }  # fmt: skip
    assert record.kind(chosen, Budget(loops=2, ffn=8)) == "untrained"
    alone = LoopRecord.of(Shortcut(short_weight=0.0, consistency_weight=0.0))
    assert [alone.kind(chosen, Budget(loops=one)) for one in (1, 4)] == ["untrained", "trained"]
    fixed = LoopRecord.of(Shortcut(sampler="fixed", trajectories=(2, (3, 1))))
    assert [fixed.kind(chosen, Budget(loops=one)) for one in (1, 2, (3, 1))] == ["untrained", "trained", "trained"]
    assert record.kind(sizes(condition="index"), Budget(loops=3)) == "trained"


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"sampler": "fixed"}, "give trajectories"),
        ({"trajectories": [2]}, "only then"),
        ({"short_weight": -1}, "greater than or equal to 0"),
        ({"trajectories": [[2, 0]], "sampler": "fixed"}, "greater than 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tree, says):
    with pytest.raises((ValidationError, ValueError), match=says):
        parse_settings(Shortcut, tree, "x.toml")


@pytest.mark.parametrize(
    ("objective", "model", "says"),
    [
        (Shortcut(), sizes().model_copy(update={"loop": None}), "for looped decoders"),
        (Shortcut(), sizes(times=1), "no trajectory is shorter"),
        (Shortcut(sampler="fixed", trajectories=((2, 1),)), sizes(condition="none"), "do not know of steps"),
    ],
)
def test_models_that_it_cannot_train_are_refused(objective, model, says):
    with pytest.raises(BudgetError, match=says):
        objective.build().check(Decoder(model))
