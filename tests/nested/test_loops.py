"""Budgets of loops: fewer loops in place, and taken out."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looped_cases import looped_settings
from nested_cases import decoder

from resilin.layout import missing
from resilin.layout.region import Region
from resilin.models.cache import KVCache
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.flops import block_flops_per_token
from resilin.models.huggingface import load_pretrained, save_pretrained
from resilin.models.loop_settings import LoopSettings
from resilin.nested import Budget, BudgetError, budget, cost, extract, extract_folder, is_cut, regions
from resilin.nested.loop_search import search
from resilin.nested.speculative import speculate
from resilin.nouns import Batch

TOKENS = torch.tensor([[1, 5, 9, 2, 30, 4, 11], [3, 3, 36, 7, 0, 12, 8]])
L = 4


def sizes(condition="time_and_step", times=L, **more) -> DecoderSettings:
    return looped_settings(LoopSettings(times=times, condition=condition, start="small"), **more)


def logits(model, tokens=TOKENS, **more):
    return model.logits(model(tokens, **more).hidden_BTD)


@st.composite
def cases(draw):
    condition = draw(st.sampled_from(["time_and_step", "index", "none"]))
    steps = st.lists(st.integers(1, 4), min_size=1, max_size=6).map(tuple)
    loops = draw(st.none() | st.integers(1, 6) | (steps if condition == "time_and_step" else st.nothing()))
    wanted = Budget(
        loops=loops,
        hidden=draw(st.sampled_from([None, 8, 16])),
        ffn=draw(st.sampled_from([None, 8])),
        heads=draw(st.sampled_from([None, 2])),
        skip=draw(st.sampled_from([(), (1,)])),
    )
    return sizes(condition, norm=draw(st.sampled_from(["rms", "layer"]))), wanted


@settings(max_examples=60, deadline=None)
@given(cases())
def test_what_runs_in_place_is_what_is_taken_out(case):
    chosen, wanted = case
    model = decoder(chosen)
    small = extract(model, wanted)
    with budget(model, wanted):
        inside = logits(model)
        inside.square().sum().backward()
    torch.testing.assert_close(inside, logits(small), rtol=1e-9, atol=1e-9)
    used = regions(chosen, wanted)
    for name, parameter in model.named_parameters():
        for box in missing(Region.whole(parameter.shape), used.get(name, ())):
            assert parameter.grad is None or not parameter.grad[box.slices].any(), name
    told = cost(chosen, wanted, sequence_length=12)
    assert told.parameters == sum(p.numel() for p in small.parameters())
    with torch.no_grad(), budget(model, wanted):
        cache = KVCache.of(model, 2, 8)
        parts = [logits(model, part, cache=cache) for part in (TOKENS[:, :4], TOKENS[:, 4:])]
    entries = len(cache.keys_LBKCD) - len(wanted.skip) * len(small.trajectory)
    key_heads = small.blocks[0].attention.key_heads
    assert told.kv_bytes == 2 * 4 * entries * key_heads * chosen.head_width
    torch.testing.assert_close(torch.cat(parts, 1), inside, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("condition", ["time_and_step", "index", "none"])
def test_all_loops_are_the_plain_model_bit_for_bit(condition):
    model = decoder(sizes(condition), torch.float32)
    whole = logits(model)
    same = [Budget(loops=L), Budget(loops=None)]
    same += [Budget(loops=(1, 1, 1, 1)), Budget(loops=(3,) * L)] if condition == "time_and_step" else []
    for wanted in same:
        with budget(model, wanted):
            assert not is_cut(model)
            assert torch.equal(logits(model), whole)
    with budget(model, Budget(loops=L - 1)):
        assert not torch.equal(logits(model), whole)


def test_with_gates_at_zero_every_trajectory_is_the_identity():
    model = decoder(sizes())
    with torch.no_grad():
        for block in model.blocks:
            block.modulation.weight[:32].zero_()
            block.modulation.bias[:32].zero_()
    expected = model.norm(model.embed(TOKENS))
    for loops in (1, 2, 3, 4, 7, (1, 3), (2, 1, 1)):
        with budget(model, Budget(loops=loops)):
            assert torch.equal(model(TOKENS).hidden_BTD, expected)


def test_operations_grow_by_the_blocks_with_each_loop_and_parameters_not():
    chosen = sizes()
    told = [cost(chosen, Budget(loops=m), sequence_length=12) for m in range(1, 7)]
    step = sum(block_flops_per_token(chosen, layer, 12) for layer in range(2))
    assert [b.flops - a.flops for a, b in itertools.pairwise(told)] == [pytest.approx(step)] * 5
    assert len({one.parameters for one in told}) == 1
    assert [one.kv_bytes // told[0].kv_bytes for one in told] == [1, 2, 3, 4, 5, 6]


def test_one_loop_that_is_told_nothing_is_taken_out_as_a_stock_model(tmp_path):
    model = decoder(sizes("none"), torch.float32)
    small = extract(model, Budget(loops=1))
    assert small.settings.loop is None
    save_pretrained(small, tmp_path)
    assert '"llama"' in (tmp_path / "config.json").read_text()


def test_a_folder_is_cut_to_fewer_loops(tmp_path):
    model = decoder(sizes(), torch.float32)
    save_pretrained(model, tmp_path / "whole")
    wanted = Budget(loops=(2, 1), hidden=8)
    small = extract_folder(tmp_path / "whole", wanted)
    assert small.settings.loop == model.settings.loop.model_copy(update={"times": 2, "steps": (2, 1)})
    with budget(model, wanted):
        torch.testing.assert_close(logits(small), logits(model))
    save_pretrained(small, tmp_path / "small")
    again = load_pretrained(tmp_path / "small")
    assert torch.equal(logits(again), logits(small))


def test_budgets_of_loops_print_parse_and_go_to_json(tmp_path):
    for text, wanted, printed in (
        ("loops=2", Budget(loops=2), "loops 2"),
        ("loops=4+1+1,ffn=8", Budget(loops=(4, 1, 1), ffn=8), "ffn 8, loops 4 2x1"),
    ):
        assert Budget.parse(text) == wanted
        assert str(wanted) == printed
        assert Budget.from_dict(wanted.to_dict()) == wanted
    assert Budget(loops=[2, 1]).loops == (2, 1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Budget(loops=0), "loops has 0"),
        (lambda: Budget(loops=(2, 0)), "loops has 0"),
        (lambda: Budget(loops=()), "loops is empty"),
        (lambda: Budget(loops=(1, None)), "the steps of all loops"),
        (lambda: Budget(loops=1.5), "loops has 1.5"),
        (lambda: budget(decoder(sizes("none")), Budget(loops=(2, 1))), "do not know of steps"),
        (lambda: budget(decoder(sizes("index")), Budget(loops=(2, 1))), "give their number, 2"),
        (lambda: budget(decoder(sizes().model_copy(update={"loop": None})), Budget(loops=2)), "blocks are run once"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(make, says):
    with pytest.raises(BudgetError, match=says):
        make()


def test_a_cache_goes_on_with_fewer_loops_and_not_with_more():
    model = decoder(sizes())
    with torch.no_grad():
        cache = KVCache.of(model, 2, 8)
        logits(model, TOKENS[:, :3], cache=cache)
        with budget(model, Budget(loops=2)):
            logits(model, TOKENS[:, 3:5], cache=cache)
        with pytest.raises(ValueError, match="4 loops cannot go on from tokens that were read with 2"):
            logits(model, TOKENS[:, 5:6], cache=cache)
        cache.take_back(2)
        again = logits(model, TOKENS[:, 3:], cache=cache)
        torch.testing.assert_close(again, logits(model)[:, 3:], rtol=1e-9, atol=1e-9)
        with budget(model, Budget(loops=5)), pytest.raises(ValueError, match="made for 4 loops"):
            logits(model, TOKENS, cache=KVCache.of(extract(model, Budget()), 2, 8))


def test_few_loops_draft_what_all_loops_verify():
    model = decoder(sizes())
    plain = list(speculate(model, [1, 2, 3], draft=Budget(), max_new_tokens=12))
    spec = speculate(model, [1, 2, 3], draft=Budget(loops=1), max_new_tokens=12)
    assert list(spec) == plain
    assert spec.drafts.proposed > 0


def test_the_search_reads_every_trajectory_and_puts_the_best_first():
    model = decoder(sizes(), torch.float32)
    batch = Batch(torch.arange(2), {"tokens": TOKENS, "labels": TOKENS.roll(-1, 1)})
    found = search(model, 3, [batch])
    assert {one.steps for one in found} == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}
    assert [one.quality.loss for one in found] == sorted(one.quality.loss for one in found)
    with torch.no_grad(), budget(model, found[0].wanted):
        loss = torch.nn.functional.cross_entropy(logits(model).flatten(0, 1), batch["labels"].flatten())
    assert found[0].quality.loss == pytest.approx(float(loss), rel=1e-5)
    for loops, says in ((5, "expected 1 to 4"), (0, "expected 1 to 4")):
        with pytest.raises(BudgetError, match=says):
            search(model, loops, [batch])
    with pytest.raises(BudgetError, match="more than 2 trajectories"):
        search(model, 3, [batch], most=2)
    with pytest.raises(BudgetError, match="told of steps"):
        search(decoder(sizes("none")), 3, [batch])
