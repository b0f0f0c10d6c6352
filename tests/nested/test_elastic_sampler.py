"""What a step of elastic pre-training draws."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.nested import Budget, BudgetError, sub_model
from resilin.nested.elastic_sampler import Depth, ElasticSampler, Sparsity, Width, left_out, spread

SETTINGS = DecoderSettings(
    vocab_size=10, hidden_size=8, layers=6, heads=2, moe=MoESettings(experts=8, experts_per_token=4, expert_size=4)
)
ALWAYS = ElasticSampler(Depth(probability=1), Width(probability=1), Sparsity(probability=1))


def draws(sampler: ElasticSampler, count: int, settings: DecoderSettings = SETTINGS) -> list[Budget]:
    sampler.check(settings)
    return [sampler.draw(settings, Keys.of_step(7, step)) for step in range(count)]


def test_coins_are_independent_and_fall_as_often_as_said():
    sampler, count = ElasticSampler(), 4000
    assert sampler.full_probability == pytest.approx(0.75 * 0.8 * 0.8)
    found = draws(sampler, count)
    seen = Counter((bool(b.skip), b.experts is not None, b.top_k is not None) for b in found)
    for outcome in seen:
        chances = (0.25, 0.2, 0.2)
        p = math.prod(c if hit else 1 - c for c, hit in zip(chances, outcome, strict=True))
        assert abs(seen[outcome] / count - p) < 3.5 * math.sqrt(p * (1 - p) / count), outcome
    assert len(seen) == 8
    assert sum(b.full for b in found) == seen[False, False, False]


def test_the_same_seed_and_step_draw_the_same():
    assert draws(ALWAYS, 20) == draws(ALWAYS, 20)
    assert len(set(draws(ALWAYS, 20))) > 10


def test_every_number_of_layers_experts_and_choices_is_drawn_alike():
    sampler = ElasticSampler(Depth(probability=1), Width(probability=1, experts=(0.25, 6)), Sparsity(probability=1))
    parts = [sub_model(SETTINGS, b).layers for b in draws(sampler, 3000)]
    layers = Counter(len(one) for one in parts)
    assert set(layers) == {2, 3, 4, 5}
    assert all(abs(n - 750) < 4 * math.sqrt(3000 * 0.25 * 0.75) for n in layers.values())
    experts = Counter(len(one[0].experts) for one in parts)
    assert set(experts) == {2, 6}
    assert abs(experts[2] - 1500) < 4 * math.sqrt(750)
    choices = Counter(one[0].top_k for one in parts if len(one[0].experts) == 6)
    assert set(choices) == {1, 2, 3}
    assert {one[0].top_k for one in parts if len(one[0].experts) == 2} == {1, 2}  # no more than there are
    which = Counter(number for one in parts if len(one[0].experts) == 2 for number in one[0].experts)
    assert set(which) == set(range(8))
    assert max(which.values()) < 1.5 * min(which.values())


def test_plans_of_layers():
    kept = [set(range(6)) - set(b.skip) for b in draws(ElasticSampler(Depth(probability=1)), 300)]
    assert all({0, 5} <= one for one in kept)
    assert {frozenset(one) for one in kept if len(one) == 3} == {frozenset({0, n, 5}) for n in range(1, 5)}
    anything = ElasticSampler(Depth(probability=1, keep=()))
    assert {len(b.skip) for b in draws(anything, 300)} == {1, 2, 3, 4, 5}
    prefix = [b.skip for b in draws(ElasticSampler(Depth(probability=1, plan="prefix", least=3)), 100)]
    assert set(prefix) == {(5,), (4, 5), (3, 4, 5)}
    plans = ((0, 2, 5), (0, 5))
    fixed = [b.skip for b in draws(ElasticSampler(Depth(probability=1, plan="fixed", plans=plans)), 100)]
    assert set(fixed) == {(1, 3, 4), (1, 2, 3, 4)}


def test_layers_draw_their_own_experts_unless_they_share():
    own = draws(ElasticSampler(width=Width(probability=1)), 20)
    assert all(len(set(b.experts)) > 1 for b in own)
    shared = draws(ElasticSampler(width=Width(probability=1, shared=True)), 20)
    assert all(len(set(b.experts)) == 1 for b in shared)
    dense = SETTINGS.model_copy(update={"moe": SETTINGS.moe.model_copy(update={"dense_layers": (0, 3)})})
    for b in draws(ALWAYS, 20, dense):
        assert b.experts[0] is b.experts[3] is None
        sub_model(dense, b)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_spread_layers_are_so_many_with_the_ends(sizes):
    layers, count = sizes
    kept = spread(layers, count)
    assert len(set(kept)) == count
    assert list(kept) == sorted(kept)
    assert kept[0] == 0
    assert count == 1 or kept[-1] == layers - 1
    assert set(kept) | set(left_out(layers, kept)) == set(range(layers))


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (ElasticSampler(Depth(least=6)), "at least 6 of 6 layers"),
        (ElasticSampler(Depth(keep=(0, 6))), "keep is"),
        (ElasticSampler(Depth(plan="fixed", plans=((0, 9),))), "name layer 9"),
        (ElasticSampler(width=Width(experts=(8,))), "from 1 to 7"),
        (ElasticSampler(width=Width(experts=(0.3,))), "2.4 of the 8 experts"),
        (ElasticSampler(sparsity=Sparsity(least=4)), "nothing lies between"),
    ],
)
def test_ranges_without_anything_to_draw_are_refused(sampler, message):
    with pytest.raises(BudgetError, match=message):
        sampler.check(SETTINGS)


def test_axes_that_a_model_does_not_have_are_refused():
    dense = SETTINGS.model_copy(update={"moe": None})
    with pytest.raises(BudgetError, match="the model has none"):
        ElasticSampler().check(dense)
    depth_alone = ElasticSampler(width=Width(probability=0), sparsity=Sparsity(probability=0))
    assert any(b.skip for b in draws(depth_alone, 50, dense))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Depth, {"plan": "fixed"}),
        (Depth, {"plans": [[0]]}),
        (Depth, {"plan": "fixed", "plans": [[]]}),
        (Depth, {"probability": 1.5}),
        (Width, {"experts": []}),
        (Width, {"experts": [0]}),
        (Sparsity, {"least": 0}),
    ],
)
def test_bad_settings_are_refused(kind, told):
    with pytest.raises(ValidationError):
        kind.model_validate(told)
