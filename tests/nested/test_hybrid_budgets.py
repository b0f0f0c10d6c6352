"""Budgets of hybrid decoders: what runs in place is what is taken out."""

from __future__ import annotations

import pytest
import torch
from hybrid_cases import hybrid, hybrid_settings
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.inference.speculative import SpeculationError
from resilin.layout import missing
from resilin.layout.region import Region
from resilin.models.cache import KVCache
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.flops import forward_flops_per_token, parameter_counts
from resilin.models.huggingface import load_pretrained, save_pretrained
from resilin.models.hybrid import HybridDecoder
from resilin.nested import Budget, BudgetError, budget, cost, extract, extract_folder, regions, sub_settings
from resilin.nested.importance import importance, put_in_order
from resilin.nested.speculative import speculate
from resilin.nouns import Batch

TOKENS = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])


def logits(model, tokens=TOKENS, **more):
    return model.logits(model(tokens, **more).hidden_BTD)


def sizes(one):
    """For all layers, or for each of four."""
    return st.one_of(st.none(), one, st.lists(st.one_of(st.none(), one), min_size=4, max_size=4).map(tuple))


BUDGETS = st.builds(
    Budget,
    ffn=sizes(st.integers(1, 24)),
    heads=sizes(st.sampled_from([2, 4])),
    hidden=st.none() | st.integers(4, 16),
    skip=st.sampled_from([(), (0,), (1, 2), (3,), (0, 3)]),
    mamba_heads=sizes(st.sampled_from([2, 4])),
    mamba_head_size=sizes(st.integers(1, 6)),
    state_size=sizes(st.integers(1, 5)),
)


@settings(max_examples=40, deadline=None)
@given(BUDGETS)
def test_what_runs_in_place_is_what_is_taken_out(wanted):
    model = hybrid()
    small = extract(model, wanted)
    assert isinstance(small, HybridDecoder)
    assert small.settings == sub_settings(model.settings, wanted)
    with budget(model, wanted):
        inside = logits(model, documents_BT=DOCUMENTS)
        cache = KVCache.of(model, 2, 10)
        with torch.no_grad():
            cached = torch.cat([logits(model, part, cache=cache) for part in TOKENS.split([5, 1, 3], 1)], 1)
    torch.testing.assert_close(inside, logits(small, documents_BT=DOCUMENTS), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cached, logits(small), rtol=1e-9, atol=1e-9)
    inside.square().sum().backward()
    used = regions(model.settings, wanted)
    for name, parameter in model.named_parameters():
        for box in missing(Region.whole(parameter.shape), used.get(name, ())):
            assert parameter.grad is None or not parameter.grad[box.slices].any(), name


@settings(max_examples=30, deadline=None)
@given(BUDGETS)
def test_costs_are_those_of_the_model_that_is_taken_out(wanted):
    model = hybrid(torch.float32)
    small, told = extract(model, wanted), cost(model.settings, wanted, sequence_length=12)
    assert told.parameters == sum(p.numel() for p in small.parameters())
    assert told.parameters == sum(box.numel for boxes in regions(model.settings, wanted).values() for box in boxes)
    assert told.non_embedding == parameter_counts(small.settings).non_embedding
    assert told.flops == forward_flops_per_token(small.settings, 12)
    mamba = [block.mamba for block in small.blocks if block.kind == "mamba"]
    inputs = sum(3 * (one.x.out_features + 2 * one.B.out_features) for one in mamba)
    states = sum(one.x.out_features * one.B.out_features // one.groups for one in mamba)
    assert told.state_bytes == 4 * (inputs + states)
    keys = sum(block.attention.key_heads for block in small.blocks if block.kind == "attention")
    assert told.kv_bytes == 2 * 4 * keys * small.settings.head_width


def test_the_full_budget_is_the_plain_model():
    model = hybrid(torch.float32)
    with budget(model, Budget(mamba_heads=4, state_size=5)):
        assert torch.equal(logits(model), logits(hybrid(torch.float32)))


def test_a_member_of_one_size_opens_in_transformers_and_is_read_from_its_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, wanted = hybrid(torch.float32), Budget(ffn=8, mamba_heads=2, mamba_head_size=4, state_size=3, hidden=12)
    save_pretrained(model, tmp_path / "whole")
    small = extract_folder(tmp_path / "whole", wanted)
    torch.testing.assert_close(logits(small), logits(extract(model, wanted)), rtol=0, atol=0)
    save_pretrained(small, tmp_path / "small")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(theirs(TOKENS).logits, logits(small), rtol=1e-4, atol=1e-5)
    uneven = extract(model, Budget(mamba_heads=(2, None, None, 4)))
    save_pretrained(uneven, tmp_path / "uneven")
    assert torch.equal(logits(load_pretrained(tmp_path / "uneven")), logits(uneven))


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Budget(mamba_heads=3), "use one of 2, 4"),
        (Budget(mamba_heads=6), "use at most 4"),
        (Budget(state_size=6), "use at most 5"),
        (Budget(experts=2), "no experts"),
        (Budget(ffn=(1, 2)), "4 layers"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(wanted, words):
    with pytest.raises(BudgetError, match=words):
        sub_settings(hybrid_settings(), wanted)


def test_decoders_without_mamba_have_none_of_its_sizes():
    with pytest.raises(BudgetError, match="no Mamba-2 layers"):
        sub_settings(DecoderSettings(vocab_size=9), Budget(state_size=3))
    with pytest.raises(BudgetError, match="no Mamba-2 layers"):
        sub_settings(hybrid_settings(pattern="*-"), Budget(mamba_heads=2))


def test_in_order_of_importance_the_whole_computes_the_same():
    model, batch = hybrid(), Batch(torch.arange(2), {"tokens": TOKENS})
    before = logits(model)
    for batches in (None, [batch]):
        scores = importance(model, batches)
        old = model.blocks[0].mamba.A_log.clone()
        put_in_order(model, scores)
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)
        groups = old.view(2, -1), model.blocks[0].mamba.A_log.view(2, -1)
        assert torch.equal(groups[0].sort(1).values, groups[1].sort(1).values)  # heads stay in their group
        norms = importance(model, batches)["blocks.0.mamba"].view(4, -1).norm(dim=0)
        assert (norms.diff() <= 1e-12).all()


def test_drafts_are_refused():
    with pytest.raises(SpeculationError, match="without a draft"):
        speculate(hybrid(torch.float32), [1, 2], Budget(ffn=4))
