"""Families: every member can be built, keeps its proportions, and has an even number of heads."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.settings import ModelContext
from resilin.planner.family import Architecture, Family

BASES = [
    DecoderSettings(vocab_size=1000, hidden_size=768, layers=12, heads=12),
    DecoderSettings(vocab_size=1000, hidden_size=576, layers=30, heads=9, kv_heads=3, mlp_size=1536),
    DecoderSettings(vocab_size=1000, hidden_size=1024, layers=28, heads=16, kv_heads=8, head_size=128, mlp_size=3072),
    DecoderSettings(vocab_size=1000, hidden_size=64, layers=3, heads=4, tie_embeddings=True, gated=False),
    DecoderSettings(
        vocab_size=1000, hidden_size=512, layers=8, heads=8, kv_heads=2, moe=MoESettings(dense_layers=(0,)),
        sliding_window=64, window_layers=(0, 7),
    ),
]  # fmt: skip


@pytest.mark.parametrize("base", BASES)
def test_every_member_is_valid_even_headed_and_larger_than_the_one_before(base: DecoderSettings) -> None:
    members = Family(base, largest=2e9).members
    assert len(members) > 5
    sizes = [member.parameters for member in members]
    assert sizes == sorted(set(sizes))
    for member in members:
        settings = member.settings
        assert settings.heads % 2 == 0
        assert settings.hidden_size % settings.head_width == 0
        assert settings.heads % settings.key_heads == 0
        assert settings.head_width == base.head_width
        # the nearest whole number of layers for the width
        assert (
            abs(settings.layers - base.layers * settings.hidden_size / base.hidden_size) <= 0.5 or settings.layers == 1
        )


@pytest.mark.parametrize("base", BASES)
def test_the_parameters_of_a_plan_are_those_of_the_built_model(base: DecoderSettings) -> None:
    member = Family(base).member(2)
    model = member.settings.build(ModelContext(0))
    assert sum(p.numel() for p in model.parameters()) == member.total
    outside = {id(model.embed.weight): model.embed.weight, id(model.head_weight): model.head_weight}
    assert member.parameters == member.total - sum(p.numel() for p in outside.values())


@given(st.floats(1e5, 1e9))
def test_the_nearest_member_is_nearer_than_all_others(parameters: float) -> None:
    family = Family(BASES[0], largest=2e9)
    best = family.nearest(parameters)
    distances = [abs(math.log(member.parameters / parameters)) for member in family.members]
    assert abs(math.log(best.parameters / parameters)) == min(distances)


def test_a_family_has_no_member_of_an_odd_number_of_heads() -> None:
    with pytest.raises(ValueError, match="even number of heads, not 3"):
        Family(BASES[0]).member(3)


def test_a_family_without_any_member_says_how_small_it_can_be() -> None:
    with pytest.raises(ValueError, match="smallest member has"):
        _ = Family(BASES[0], largest=1000).members


def test_key_value_sharing_stays_as_near_as_the_heads_allow() -> None:
    shared = Family(BASES[1])  # 9 heads over 3
    assert [(m.settings.heads, m.settings.key_heads) for m in shared.members[:4]] == [(2, 1), (4, 1), (6, 2), (8, 2)]


def test_the_overrides_of_a_member_make_it_out_of_the_base() -> None:
    member = Family(BASES[1]).member(6)
    changed = dict(item.removeprefix("model.").split("=") for item in member.overrides())
    again = BASES[1].model_copy(update={key: int(value) for key, value in changed.items()})
    assert Architecture.of(again) == member
