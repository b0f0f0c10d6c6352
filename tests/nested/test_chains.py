"""Budgets of chains: a scale in place, taken out, and changed in the middle of a text."""

from __future__ import annotations

import pytest
import torch
from chain_cases import chain_decoder, chain_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from resilin.inference.sampling import Sampling
from resilin.layout import missing
from resilin.layout.region import Region
from resilin.models.cache import KVCache
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface import config_from_settings, load_pretrained, save_pretrained
from resilin.nested import Budget, BudgetError, budget, cost, extract, extract_folder, is_cut, regions, sub_settings
from resilin.nested.chain_text import ChainText
from resilin.nested.importance import ImportanceError, importance
from resilin.nested.speculative import speculate

TOKENS = torch.tensor([[1, 5, 9, 2, 30, 4, 11], [3, 3, 36, 7, 0, 12, 8]])


def logits(model, tokens=TOKENS, **more):
    return model.logits(model(tokens, **more).hidden_BTD)


@st.composite
def cases(draw):
    sizes = draw(st.sampled_from([(2, 2), (2, 2, 4), (4, 2, 2)]))
    chosen = chain_settings(
        sizes,
        draw(st.booleans()),
        qk_norm=draw(st.sampled_from(["none", "rms"])),
        norm=draw(st.sampled_from(["rms", "layer"])),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        loop=draw(st.sampled_from([None, {"times": 2, "condition": "none"}])),
        layers=3,
    )
    wanted = Budget(
        chains=draw(st.none() | st.integers(1, len(sizes))),
        skip=draw(st.sampled_from([(), (1,)])),
        loops=draw(st.sampled_from([None, 1])),
    )
    return chosen, wanted


@settings(max_examples=20, deadline=None)
@given(cases())
def test_what_runs_in_place_is_what_is_taken_out(case):
    chosen, wanted = case
    model = chain_decoder(chosen)
    small = extract(model, wanted)
    with budget(model, wanted):
        inside = logits(model)
        inside.square().sum().backward()
    torch.testing.assert_close(inside, logits(small))
    used = regions(chosen, wanted)
    for name, parameter in model.named_parameters():
        for box in missing(Region.whole(parameter.shape), used.get(name, ())):
            assert parameter.grad is None or not parameter.grad[box.slices].any(), name
    told = cost(chosen, wanted, sequence_length=12)
    assert told.parameters == sum(p.numel() for p in small.parameters())
    with torch.no_grad(), budget(model, wanted):
        cache = KVCache.of(model, 2, 8)
        parts = [logits(model, part, cache=cache) for part in (TOKENS[:, :4], TOKENS[:, 4:])]
    torch.testing.assert_close(torch.cat(parts, 1), inside)
    entries = (chosen.layers - len(wanted.skip)) * len(small.trajectory)
    assert told.kv_bytes == 2 * 4 * entries * small.settings.key_heads * chosen.head_width


@settings(max_examples=20, deadline=None)
@given(cases())
def test_a_scale_is_the_first_chains_of_the_whole(case):
    chosen, _ = case
    model = chain_decoder(chosen)
    whole = model(TOKENS).hidden_BTD
    for chains, width in enumerate(model.norm.reach, 1):
        with budget(model, Budget(chains=chains)):
            states = model(TOKENS).hidden_BTD
            torch.testing.assert_close(model.logits(states), model.logits(whole[..., :width]))
        torch.testing.assert_close(states, whole[..., :width])
    assert not is_cut(model)


def test_all_chains_are_the_plain_model_bit_for_bit():
    model = chain_decoder(chain_settings(), torch.float32)
    expected = logits(model)
    for wanted in (Budget(), Budget(chains=3)):
        with budget(model, wanted):
            assert not is_cut(model)
            assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("share_keys", [False, True])
@pytest.mark.parametrize("chains", [1, 2, 3])
def test_work_of_later_chains_is_not_done(chains, share_keys):
    """Operations in place are those of the small model, exactly; so is what is told of them."""
    chosen = chain_settings((2, 2, 4), share_keys, attention_backend="eager")
    model, wanted = chain_decoder(chosen), Budget(chains=chains)
    small = extract(model, wanted)
    counts = []
    for one, within in ((model, wanted), (small, Budget())):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), budget(one, within):
            logits(one, TOKENS[:1])
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    sizes = sub_settings(chosen, wanted)
    unseen = sizes.layers * 4 * sizes.heads * sizes.head_width * (7 - 4)
    assert counts[0] == 7 * (cost(chosen, wanted, sequence_length=7).flops + unseen)


@pytest.mark.parametrize("share_keys", [False, True])
def test_the_first_chain_is_an_ordinary_model_of_its_family(share_keys, tmp_path):
    model = chain_decoder(chain_settings((4, 4), share_keys), torch.float32)
    small = extract(model, Budget(chains=1))
    assert small.settings.chains is None
    assert config_from_settings(small.settings, "float32", None)["model_type"] == "llama"
    save_pretrained(small, tmp_path / "small")
    with budget(model, Budget(chains=1)):
        expected = logits(model)
    torch.testing.assert_close(logits(load_pretrained(tmp_path / "small")), expected)


@pytest.mark.parametrize("chains", [1, 2])
def test_of_a_folder_the_first_chains_are_read(chains, tmp_path):
    model = chain_decoder(chain_settings(), torch.float32)
    save_pretrained(model, tmp_path)
    small, expected = extract_folder(tmp_path, Budget(chains=chains)), extract(model, Budget(chains=chains))
    assert small.settings == expected.settings
    for (name, one), two in zip(small.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Budget(chains=4), "chains is 4, and the model has 3"),
        (Budget(ffn=8), "ffn: of a decoder of chains"),
        (Budget(hidden=8), "hidden: of a decoder of chains"),
        (Budget(heads=2), "heads: of a decoder of chains"),
    ],
)
def test_budgets_that_cut_through_chains_are_refused(wanted, said):
    model = chain_decoder(chain_settings())
    with pytest.raises(BudgetError, match=said):
        budget(model, wanted)


def test_other_models_have_no_chains():
    plain = chain_decoder(chain_settings().model_copy(update={"chains": None}))
    with pytest.raises(BudgetError, match=r"no model\.chains"):
        budget(plain, Budget(chains=1))
    with pytest.raises(BudgetError, match="chains has 0"):
        Budget(chains=0)
    with pytest.raises(BudgetError, match="decoders of chains"):
        ChainText(plain, [1], 1)


def test_chains_are_not_put_in_order():
    with pytest.raises(ImportanceError, match="nothing is to be put"):
        importance(chain_decoder(chain_settings()))


def test_a_budget_of_chains_is_told_and_read():
    assert Budget.parse("chains=2") == Budget(chains=2)
    assert Budget(chains=2).to_dict() == {"chains": 2}
    assert str(Budget(chains=2, skip=(1,))) == "skip 1, chains 2"


# -- caches -----------------------------------------------------------------------------------------------------------


def air(**more) -> DecoderSettings:
    return chain_settings((2, 2, 4), True, **more)


def test_with_shared_keys_every_scale_makes_the_same_cache():
    model, caches = chain_decoder(air()), []
    for chains in (1, 2, 3):
        with torch.no_grad(), budget(model, Budget(chains=chains)):
            caches.append(KVCache.of(model, 2, 8))
            model(TOKENS, cache=caches[-1])
    for other in caches[1:]:
        torch.testing.assert_close(other.keys_LBKCD, caches[0].keys_LBKCD)
        torch.testing.assert_close(other.values_LBKCD, caches[0].values_LBKCD)
    for chains in (1, 2, 3):
        told = cost(model.settings, Budget(chains=chains))
        assert told.kv_bytes == 2 * model.settings.layers * model.settings.key_heads * model.settings.head_width * 4


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=6, max_size=6))
def test_scales_change_at_any_token_without_reading_anew(scales):
    """Logits over a cache that other scales have filled are those of the scale over the whole text."""
    model = chain_decoder(air())
    with torch.no_grad():
        expected = {}
        for chains in (1, 2, 3):
            with budget(model, Budget(chains=chains)):
                expected[chains] = logits(model)
        cache = KVCache.of(model, 2, 8)
        with budget(model, Budget(chains=1)):
            model(TOKENS[:, :1], cache=cache)
        for place, chains in enumerate(scales, 1):
            with budget(model, Budget(chains=chains)):
                found = logits(model, TOKENS[:, place : place + 1], cache=cache)
            torch.testing.assert_close(found[:, 0], expected[chains][:, place])


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=8, max_size=8))
def test_text_of_changing_scales_is_that_of_reading_everything_anew(scales):
    model, text = chain_decoder(air()), [1, 5, 9]
    found = list(ChainText(model, text, scales.__getitem__, max_new_tokens=8))
    with torch.no_grad():
        for chains in scales:
            with budget(model, Budget(chains=chains)):
                text.append(int(logits(model, torch.tensor([text]))[0, -1].argmax()))
    assert found == text[3:]


def test_text_stops_where_it_is_told_and_draws_from_its_seed():
    model = chain_decoder(air())
    whole = list(ChainText(model, [4], 2, max_new_tokens=12))
    assert len(whole) == 12
    stopped = list(ChainText(model, [4], 2, max_new_tokens=12, stop_ids=frozenset(whole[:1])))
    assert stopped == whole[:1]
    warm = Sampling(temperature=1.0)
    drawn = [list(ChainText(model, [4], 3, max_new_tokens=12, sampling=warm, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_with_keys_of_their_own_chains_are_left_out_and_not_taken_in():
    model = chain_decoder(chain_settings())
    with torch.no_grad():
        cache = KVCache.of(model, 2, 8)
        model(TOKENS[:, :3], cache=cache)
        with budget(model, Budget(chains=1)):
            expected = logits(model)
            found = logits(model, TOKENS[:, 3:5], cache=cache)
        torch.testing.assert_close(found, expected[:, 3:5])
        with pytest.raises(ValueError, match=r"3 chains cannot go on from tokens that were read with 1.*share_keys"):
            model(TOKENS[:, 5:6], cache=cache)
        cache.take_back(2)  # only tokens of all chains are left
        torch.testing.assert_close(logits(model, TOKENS[:, 3:5], cache=cache), logits(model)[:, 3:5])
    with pytest.raises(ValueError, match="cannot go on"):
        list(ChainText(model, [1, 2, 3], lambda n: 1 + n, max_new_tokens=2))
    assert len(list(ChainText(model, [1, 2, 3], lambda n: 2 - n, max_new_tokens=2))) == 2


def test_the_first_chain_drafts_for_all_over_one_cache():
    model = chain_decoder(air())
    drafted = list(speculate(model, [1, 2, 3], Budget(chains=1), max_new_tokens=10))
    assert drafted == list(ChainText(model, [1, 2, 3], 3, max_new_tokens=10))
