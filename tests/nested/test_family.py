"""Mix'n'Match, consistency, ordering, speculation: what holds exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nested_cases import DECODERS, TOKENS, decoder

from resilin.inference.generate import StopRule, generate, stream
from resilin.inference.sampling import Sampling
from resilin.inference.speculative import SpeculationError
from resilin.models.cache import KVCache
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.nested import Budget, BudgetError, budget, cost, extract
from resilin.nested.consistency import consistency
from resilin.nested.granularities import budget_at
from resilin.nested.importance import ImportanceError, importance, put_in_order
from resilin.nested.mix_n_match import at_latency, ladder, mix_n_match
from resilin.nested.speculative import speculate
from resilin.nested.sub_model import sub_model
from resilin.nouns import Batch

PLAIN = DecoderSettings(
    vocab_size=37, hidden_size=16, layers=6, heads=4, kv_heads=2, mlp_size=64, init_std=0.4, max_positions=64
)
SHARES = (0.125, 0.25, 0.5, 1)
BATCH = Batch(torch.arange(2), {"tokens": TOKENS[:, :-1], "labels": TOKENS[:, 1:]})


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.logits(model(tokens).hidden_BTD)


@settings(max_examples=80)
@given(
    share=st.floats(0.3, 1.2),
    unit=st.sampled_from(["params", "flops", "non_embedding"]),
    targets=st.sampled_from([("ffn",), ("ffn", "heads")]),
    tie=st.booleans(),
)
def test_mix_n_match_is_the_rule_of_the_paper(share, unit, targets, tie):
    chosen = PLAIN.model_copy(update={"tie_embeddings": tie, "heads": 8, "kv_heads": 8, "head_size": 2})
    field = {"params": "parameters"}.get(unit, unit)

    def costs(wanted):
        return getattr(cost(chosen, wanted), field)

    whole = costs(Budget())
    limit = share * whole
    found = mix_n_match(chosen, limit, SHARES, unit=unit, targets=targets)
    widths = [part.ffn for part in sub_model(chosen, found).layers]
    trained = [int(64 * one) for one in SHARES]
    assert widths == sorted(widths)
    assert set(widths) <= set(trained)
    places = sorted(trained.index(width) for width in set(widths))
    assert places[-1] - places[0] <= 1
    if costs(budget_at(chosen, SHARES[0], targets)) <= limit:
        assert costs(found) <= limit
    else:
        assert set(widths) == {trained[0]}
    if costs(found) < whole:  # one more wide layer would exceed it
        at = places[0]
        wide = sum(width == trained[at + 1] for width in widths) if len(places) > 1 else 0
        more = [SHARES[at]] * (chosen.layers - wide - 1) + [SHARES[at + 1]] * (wide + 1)
        assert costs(budget_at(chosen, more, targets)) > limit


def test_the_ladder_ascends_from_the_smallest_to_the_whole_model():
    rungs = ladder(PLAIN, SHARES)
    assert len(rungs) == PLAIN.layers * (len(SHARES) - 1) + 1
    costs = [cost(PLAIN, wanted).parameters for _, wanted in rungs]
    assert costs == sorted(set(costs))
    assert sub_model(PLAIN, rungs[-1][1]) == sub_model(PLAIN, Budget())
    assert [name for name, _ in rungs][:2] == ["0.125", "0.125 x5, 0.25 x1"]


def test_limits_in_seconds_are_met_by_what_was_measured():
    def measured(wanted):
        return cost(PLAIN, wanted).parameters / 1e6

    limit = measured(budget_at(PLAIN, 0.5))
    assert measured(at_latency(PLAIN, limit, SHARES, measured)) == limit
    with pytest.raises(BudgetError, match="more than nothing"):
        mix_n_match(PLAIN, 0, SHARES)


def test_consistency_is_that_of_the_models_taken_out():
    model = decoder(PLAIN, torch.float32)
    members = [Budget(ffn=8), Budget(ffn=32, skip=(2,), hidden=12), Budget()]
    told = consistency(model, members, [BATCH, BATCH])
    whole = logits(model, BATCH["tokens"]).log_softmax(-1)
    for wanted, one in zip(members, told, strict=True):
        part = logits(extract(model, wanted), BATCH["tokens"]).log_softmax(-1)
        loss = torch.nn.functional.nll_loss(part.flatten(0, 1), BATCH["labels"].flatten())
        assert one.tokens == 24
        assert one.loss == pytest.approx(float(loss), rel=1e-4)
        assert one.kl == pytest.approx(float((whole.exp() * (whole - part)).sum(-1).mean()), rel=1e-4, abs=1e-7)
        assert one.agreement == pytest.approx(float((whole.argmax(-1) == part.argmax(-1)).float().mean()))
    assert (told[-1].agreement, told[-1].kl) == (1.0, 0.0)
    assert told[0].kl > 0


@settings(max_examples=25)
@given(DECODERS, st.booleans())
def test_ordering_leaves_the_whole_model_unchanged(chosen, with_data):
    model = decoder(chosen)
    before = logits(model)
    put_in_order(model, importance(model, [BATCH] if with_data else None))
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("moe", [None, MoESettings(experts=4, experts_per_token=2, expert_size=32)])
def test_ordering_puts_what_matters_first(moe):
    chosen = PLAIN.model_copy(update={"moe": moe})
    model = decoder(chosen)
    with torch.no_grad():  # what matters stands last
        for block in model.blocks:
            down = block.moe.experts.down if moe else block.mlp.down.weight
            down[..., : down.shape[-1] * 3 // 4] *= 1e-3
            block.attention.o.weight[:, : chosen.head_width * 2] *= 1e-3
    whole, wanted = logits(model), budget_at(chosen, 0.5, ("ffn", "heads"))
    with budget(model, wanted):
        before = (logits(model) - whole).abs().mean()
    put_in_order(model, importance(model, [BATCH]))
    scores = importance(model, [BATCH])
    for name, score in scores.items():
        if "attention" not in name:
            assert (score.diff(dim=-1) <= 1e-12).all(), name
    with budget(model, wanted):
        assert (logits(model) - whole).abs().mean() < 0.1 * before
    with pytest.raises(ImportanceError, match="no batch"):
        importance(model, [])


@pytest.mark.parametrize(
    "draft", [Budget(ffn=8), Budget(ffn=64), Budget(ffn=16, heads=2, skip=(1, 4)), Budget(hidden=8)]
)
@pytest.mark.parametrize("ahead", [1, 3, 6])
def test_greedy_speculation_writes_the_verifiers_text(draft, ahead):
    model = decoder(PLAIN)
    for verifier in (Budget(), Budget(ffn=32)):
        with budget(model, verifier):
            (expected,) = generate(model, [[3, 1, 4]], StopRule(20, frozenset(), ()))
        speculation = speculate(model, [3, 1, 4], draft, 20, verifier, ahead)
        assert list(speculation) == expected.tokens
        assert speculation.drafts.accepted + speculation.drafts.rounds == 20
        if draft == Budget(ffn=64) and verifier.full:  # the verifier itself: nothing is ever refused
            assert speculation.drafts.accepted == speculation.drafts.proposed


def test_budgets_may_change_between_tokens():
    """Each token is written by the budget that is entered around it, over the cache that others have filled."""
    model, prompt = decoder(PLAIN), [3, 1, 4]
    wanted = [Budget(ffn=8), Budget(), Budget(ffn=32, skip=(2,), heads=2)] * 3
    pieces, said = stream(model, [prompt], StopRule(len(wanted), frozenset(), ())), []
    for one in wanted:
        with budget(model, one):
            said.append(next(pieces).token)
    cache, expected, new = KVCache.of(model, 1, 32), [], torch.tensor([prompt])
    for one in wanted:
        with torch.no_grad(), budget(model, one):
            new = model.logits(model(new, cache=cache).hidden_BTD[:, -1]).argmax(-1, keepdim=True)
        expected.append(int(new))
    assert said == expected
    with budget(model, wanted[0]):
        (alone,) = generate(model, [prompt], StopRule(len(wanted), frozenset(), ()))
    assert said != alone.tokens


def test_speculation_stops_at_stop_ids_and_at_the_end_of_the_positions():
    model = decoder(PLAIN)
    texts = list(speculate(model, [5], Budget(ffn=8), 20))
    stop = texts[4]
    cut = list(speculate(model, [5], Budget(ffn=8), 20, stop_ids=frozenset({stop})))
    assert cut == texts[: texts.index(stop) + 1]
    assert len(list(speculate(model, [1] * 60, Budget(ffn=8), 20))) == 4
    with pytest.raises(SpeculationError, match="at least one token"):
        speculate(model, [5], Budget(ffn=8), ahead=0)
    with pytest.raises(SpeculationError, match="repetition penalty"):
        speculate(model, [5], Budget(ffn=8), sampling=Sampling(repetition_penalty=1.1))


def test_sampled_speculation_has_the_verifiers_distribution():
    """Over many seeds, the first two tokens are distributed as the verifier alone would draw them."""
    chosen = DecoderSettings(vocab_size=5, hidden_size=8, layers=2, heads=2, mlp_size=16, init_std=0.6)
    model, prompt = decoder(chosen), [1, 2]
    temperature, count = 0.9, 500
    first = (logits(model, torch.tensor([prompt]))[0, -1] / temperature).softmax(-1)
    expected = torch.stack(
        [first[a] * (logits(model, torch.tensor([[*prompt, a]]))[0, -1] / temperature).softmax(-1) for a in range(5)]
    ).flatten()
    counts, kept = torch.zeros(25), 0
    for seed in range(count):
        one = speculate(model, prompt, Budget(ffn=2), 2, ahead=1, sampling=Sampling(temperature=temperature, seed=seed))
        a, b = one
        counts[5 * a + b] += 1
        kept += one.drafts.accepted
    assert 0 < kept < count  # some are refused, some are not
    chi2 = float(((counts - count * expected) ** 2 / (count * expected)).sum())
    assert chi2 < 24 + 5 * math.sqrt(48)  # 24 degrees of freedom; five standard deviations


def test_taking_back_tokens_leaves_the_cache_as_before():
    model = decoder(PLAIN)
    cache, straight = KVCache.of(model, 1, 16), KVCache.of(model, 1, 16)
    with torch.no_grad():
        for held in (cache, straight):
            model(TOKENS[:1, :3], cache=held)
        model(TOKENS[1:, :4], cache=cache)
        cache.take_back(4)
        assert int(cache.length) == cache.reach == 3
        mine, theirs = (model(TOKENS[:1, 3:], cache=held).hidden_BTD for held in (cache, straight))
    assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="cannot be taken back"):
        cache.take_back(8)
