"""What joining is measured against, and what is looked at beside it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from joined_cases import SIZES, anchor_model, logits, rows_of, tokens, train, trained_expert

from resilin.joined import JoinError, attribution, join_models
from resilin.joined.averaging import average, shares_of
from resilin.joined.domain import Domain, chosen, document_vectors, domain_rows
from resilin.joined.ensemble import label_logprobs, mixed_logprobs, prompt_weights
from resilin.joined.expert import expert_at
from resilin.joined.extraction import extraction_rate, similarity
from resilin.joined.proxies import proxies
from resilin.joined.training import use_experts
from resilin.joined.upcycle import upcycle
from resilin.nested import Budget
from resilin.nouns import Batch


def batch(seed: int = 0, length: int = 12) -> Batch:
    ids = tokens(seed, length=length + 1)
    return Batch(torch.arange(len(ids)), {"tokens": ids[:, :-1], "labels": ids[:, 1:]})


def test_the_average_is_the_mean_of_each_parameter():
    one, other = anchor_model(seed=0), anchor_model(seed=1)
    mean = average([one, other], [1.0, 3.0])
    for name, parameter in mean.named_parameters():
        torch.testing.assert_close(parameter, 0.25 * one.get_parameter(name) + 0.75 * other.get_parameter(name))
    assert all(torch.equal(p, one.get_parameter(n)) for n, p in average([one, one, one]).named_parameters())
    with pytest.raises(JoinError, match="different sizes"):
        average([one, anchor_model(mlp_size=32)])
    with pytest.raises(JoinError, match="3 weights for 2 models"):
        shares_of([1.0, 1.0, 1.0], 2)
    with pytest.raises(JoinError, match="at least 0"):
        shares_of([-1.0, 2.0], 2)


@given(st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_an_ensemble_mixes_probabilities_by_the_prompt(top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    logprobs_MBTV = torch.randn(4, 3, 5, 7, generator=generator).double().log_softmax(-1)
    weights_MB = prompt_weights(5 * torch.randn(4, 3, generator=generator), top_k)
    torch.testing.assert_close(weights_MB.sum(0), torch.ones(3, dtype=torch.float64))
    assert ((weights_MB > 0).sum(0) == top_k).all()
    mixed_BTV = torch.stack([mixed_logprobs(logprobs_MBTV[..., v], weights_MB) for v in range(7)], -1)
    torch.testing.assert_close(mixed_BTV.exp().sum(-1), torch.ones(3, 5, dtype=torch.float64))
    expected = (weights_MB[..., None, None] * logprobs_MBTV.exp()).sum(0)
    torch.testing.assert_close(mixed_BTV.exp(), expected)


def test_an_ensemble_of_one_model_is_the_model():
    model = anchor_model()
    own_BT = label_logprobs(model, batch())
    assert torch.equal(
        own_BT, logits(model, batch()["tokens"]).log_softmax(-1).gather(-1, batch()["labels"][..., None])[..., 0]
    )
    mixed = mixed_logprobs(own_BT[None], prompt_weights(own_BT[None, :, :4].sum(-1)))
    torch.testing.assert_close(mixed.float(), own_BT)


def test_the_same_model_upcycled_computes_the_same():
    model = anchor_model()
    for top_k in (1, 3):
        mixture = upcycle([model] * 3, top_k=top_k)
        torch.testing.assert_close(logits(mixture, tokens()), logits(model, tokens()), atol=1e-5, rtol=1e-5)
    other = train(anchor_model(), 3)
    mixed = upcycle([model, other])
    assert torch.equal(mixed.blocks[0].moe.experts.up[1], other.blocks[0].mlp.up.weight)
    torch.testing.assert_close(mixed.embed.weight, (model.embed.weight + other.embed.weight) / 2)


def test_an_expert_taken_from_a_model_joins_again_to_the_same_bits():
    experts = [trained_expert(name, n) for n, name in enumerate(("news", "code"), 1)]
    joined = join_models(anchor_model(), rows_of(0), experts)
    again = join_models(anchor_model(), rows_of(0), [expert_at(joined, n, e.name) for n, e in enumerate(experts, 1)])
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in joined.named_parameters())
    with pytest.raises(JoinError, match="there is no expert 3"):
        expert_at(joined, 3, "x")


def test_attribution_is_the_mean_routing_weight():
    experts = [trained_expert(name, n) for n, name in enumerate(("news", "code"), 1)]
    joined = join_models(anchor_model(), rows_of(0), experts)
    shares_LE = attribution(joined, [batch(1), batch(2)])
    torch.testing.assert_close(shares_LE.sum(1), torch.ones(2, dtype=torch.float64))
    with torch.no_grad():
        routers = [joined(batch(seed)["tokens"]).router_logits for seed in (1, 2)]
    for layer in range(2):
        expected = torch.stack([one[layer].softmax(-1).flatten(0, 1).mean(0) for one in routers]).mean(0)
        torch.testing.assert_close(shares_LE[layer].float(), expected)
    without = attribution(joined, [batch(1)], Budget(experts=((0, 2),) * 2, top_k=1))
    assert (without[:, 1] == 0).all()
    torch.testing.assert_close(without.sum(1), torch.ones(2, dtype=torch.float64))
    assert attribution(use_experts(joined, 1), [batch(1)]).sum(1).tolist() == pytest.approx([1, 1])
    with pytest.raises(JoinError, match="no experts"):
        attribution(anchor_model(), [batch(1)])


TEXTS = {
    "code": [f"def f{n}(self, x):\n    return self.y{n} + x[{n}]\n" * 4 for n in range(12)],
    "prose": [f"It was the best of times number {n}, it was the age of wisdom. " * 4 for n in range(12)],
}


def test_rows_are_means_of_vectors_of_length_1_and_tell_domains_apart():
    domain = Domain(kind="ngrams")
    vectors = {name: document_vectors(domain, texts, None, None, 64) for name, texts in TEXTS.items()}
    for found in vectors.values():
        torch.testing.assert_close(found.norm(dim=1), torch.ones(12))
    code, prose = (domain_rows(domain, TEXTS[name], name=name, layers=2, width=64) for name in ("code", "prose"))
    assert code.shape == (2, 64)
    assert torch.equal(code[0], code[1])
    torch.testing.assert_close(code[0], vectors["code"].mean(0))
    assert (vectors["code"] @ code[0] > vectors["code"] @ prose[0]).all()
    turned = domain_rows(domain, TEXTS["code"][::-1], name="code", layers=2, width=64)
    torch.testing.assert_close(turned, code)
    few = chosen(TEXTS["code"], 3)
    assert few == chosen(TEXTS["code"][::-1], 3)
    assert set(few) < set(TEXTS["code"])
    one, other = (domain_rows(Domain(kind="random"), (), name=name, layers=2, width=8) for name in ("a", "b"))
    assert not torch.equal(one, other)


def test_rows_of_the_stream_are_what_routers_will_read():
    from resilin.data.train_tokenizer import byte_tokenizer

    words = byte_tokenizer()
    model = anchor_model(vocab_size=words.vocab_size)
    sizes = {"layers": SIZES["layers"], "width": SIZES["hidden_size"]}
    asked = {"name": "x", "model": model, "tokenizer": words, **sizes}
    rows = domain_rows(Domain(kind="stream", tokens=20), TEXTS["code"][:1], **asked)
    seen = []
    hook = model.blocks[1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        last = model(torch.tensor([words.encode(TEXTS["code"][0])[:20]])).hidden_BTD
    hook.remove()
    torch.testing.assert_close(rows[1], torch.nn.functional.normalize(seen[0].mean((0, 1)), dim=0))
    assert not torch.equal(rows[0], rows[1])
    hidden = domain_rows(Domain(kind="hidden", tokens=20), TEXTS["code"][:1], **asked)
    torch.testing.assert_close(hidden[1], torch.nn.functional.normalize(last.mean((0, 1)), dim=0))
    with pytest.raises(JoinError, match="it needs its weights"):
        domain_rows(Domain(kind="hidden"), TEXTS["code"], name="x", **sizes)
    with pytest.raises(JoinError, match="no documents"):
        domain_rows(Domain(kind="ngrams"), (), name="x", **sizes)


def test_proxies_are_the_public_documents_that_look_like_an_owners():
    domain = Domain(kind="ngrams")
    own = document_vectors(domain, TEXTS["code"][:6], None, None, 64)
    pool = TEXTS["prose"] + TEXTS["code"][6:]
    public = document_vectors(domain, pool, None, None, 64)
    found = proxies(own, public, 6)
    assert {pool[number] for number in found} == set(TEXTS["code"][6:])
    with pytest.raises(JoinError, match="0 documents of the owner"):
        proxies(own[:0], public, 3)


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
@settings(max_examples=50, deadline=None)
def test_similarity_is_one_less_the_edit_distance(left, right):
    from functools import cache

    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (left[i - 1] != right[j - 1])
        )

    expected = 1.0 if not left and not right else 1 - distance(len(left), len(right)) / max(len(left), len(right))
    assert similarity(left, right) == pytest.approx(expected)


def test_a_text_learnt_by_heart_is_extracted_and_another_is_not():
    model = anchor_model()
    text = tokens(3, batch=1, length=40)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        loss = torch.nn.functional.cross_entropy(model.logits(model(text[:, :-1]).hidden_BTD)[0], text[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    known, unknown = text[0].tolist(), tokens(4, batch=1, length=40)[0].tolist()
    assert extraction_rate(model, [known, unknown], prefix=16, length=16, samples=3) == 0.5
    assert extraction_rate(anchor_model(), [known], prefix=16, length=16, samples=3) == 0.0
    with pytest.raises(JoinError, match="at least 64 tokens"):
        extraction_rate(model, [known])
    assert math.isclose(similarity(known, known), 1.0)
