"""Rows laid one behind another, their common beginnings once: the same log-probabilities, gradients and rewards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.posttrain import joined_rows
from resilin.posttrain.joined_rows import join_rows, shared_beginnings
from resilin.posttrain.preference_loss import Preference, PreferenceLoss
from resilin.posttrain.reward_loss import PairwiseReward
from resilin.posttrain.reward_model import RewardModel
from resilin.posttrain.sequences import frozen_logprobs, label_states

LENGTHS = [(4, 2), (3, 6), (1, 5), (6, 6), (2, 1)]


def simpo(**changes: Any) -> PreferenceLoss:
    return Preference(loss="simpo", **changes).build(None)


def tokens_computed(model: Decoder) -> list[int]:
    sizes: list[int] = []
    model.embed.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:2].numel()))
    return sizes


@st.composite
def rows(draw: Any) -> tuple[Tensor, list[int]]:
    count = draw(st.integers(1, 7))
    few = st.lists(st.integers(0, 1), min_size=12, max_size=12)
    found = [draw(few)]
    for _ in range(count - 1):
        kept = draw(st.integers(0, 12))
        found.append([*found[-1][:kept], *draw(few)[kept:]])
    return torch.tensor(found), draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))


@given(rows(), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_every_token_has_a_place_that_holds_all_it_follows(made: tuple[Tensor, list[int]], worth: int) -> None:
    tokens, widths = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joined_rows, "_WORTH_SHARING", worth)
        joined = join_rows(tokens, widths)
    total = joined.tokens_1N.shape[1]
    assert total <= sum(widths)
    documents, continues = joined.documents_1N[0].tolist(), joined.continues_1N[0].tolist()
    for row, width in enumerate(widths):
        places = joined.place_RT[row, :width].tolist()
        assert joined.tokens_1N[0, places].tolist() == tokens[row, :width].tolist()
        assert joined.positions_1N[0, places].tolist() == list(range(width))
        assert set(joined.place_RT[row, width:].tolist()) <= {-1}
        for at, place in enumerate(places):  # what a place sees is its row up to there, and nothing else
            mine = (documents[place], continues[place]) if continues[place] >= 0 else (documents[place],)
            seen = [other for other in range(total) if documents[other] in mine and other <= place]
            assert seen == places[: at + 1]
    used = {place for row, width in enumerate(widths) for place in joined.place_RT[row, :width].tolist()}
    assert used == set(range(total))


def test_groups_share_what_all_begin_with_and_strangers_share_nothing() -> None:
    assert shared_beginnings([0, 9, 2, 8, 8], [20, 15, 30, 12, 9]) == [(range(2), 9), (range(2, 5), 8)]
    assert shared_beginnings([0, 3], [9, 9]) == [(range(1), 0), (range(1, 2), 0)]
    assert shared_beginnings([0, 9, 9], [9, 9, 9]) == [(range(3), 9)]
    assert shared_beginnings([], []) == []


def test_a_pair_computes_its_prompt_once_and_no_padding(tiny: Any, pairs: Any) -> None:
    batch = pairs([(9, 2), (3, 12)], prompt=11)
    batch["chosen_tokens"][:, 11], batch["rejected_tokens"][:, 11] = 1, 2  # the answers differ from the start
    model = tiny(0)
    sizes = tokens_computed(model)
    simpo()(model, batch, None)
    assert sizes == [(11 + 9 - 1 + 2 - 1) + (11 + 3 - 1 + 12 - 1)]


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_log_probabilities_and_gradients_are_those_of_rows_alone(
    tiny: Any, pairs: Any, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny(0, kv_heads=kv_heads), pairs(LENGTHS, prompt=6, width=17)
    tokens = torch.stack((batch["chosen_tokens"], batch["rejected_tokens"]), 1).flatten(0, 1)
    labels = torch.stack((batch["chosen_labels"], batch["rejected_labels"]), 1).flatten(0, 1)
    labels[3] = -100  # a row of which nothing is asked

    def measured(parts: list[slice]) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        found = [label_states(model, tokens[part], labels[part]) for part in parts]
        logp = torch.cat([states.logprobs() for states in found])
        loss = torch.stack([states.states_ND.square().sum() for states in found]).sum()
        loss.backward()
        return logp, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together = measured([slice(None)])
    monkeypatch.setattr(Decoder, "attends_by_document", False)
    alone = measured([slice(row, row + 1) for row in range(len(tokens))])
    torch.testing.assert_close(together[0], alone[0], rtol=1e-12, atol=1e-12)
    for mine, other in zip(together[1], alone[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(frozen_logprobs(model, tokens, labels), together[0], rtol=1e-12, atol=1e-12)


def test_a_loss_of_whole_logits_has_gradients_of_its_gradient(tiny: Any, pairs: Any) -> None:
    batch, objective = pairs([(4, 2), (3, 5)], prompt=6), simpo(chunk=0)

    def curved(model: Decoder) -> list[Tensor]:
        inside = [p for name, p in model.named_parameters() if "attention" in name]
        grads = torch.autograd.grad(objective(model, batch, None).sum, inside, create_graph=True)
        return list(torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), inside))

    apart = tiny(0, attention_backend="eager")
    assert not apart.attends_by_document
    for mine, other in zip(curved(tiny(0)), curved(apart), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)


def test_rows_with_random_numbers_of_their_own_stay_apart(tiny: Any, pairs: Any) -> None:
    batch, model = pairs(LENGTHS, prompt=6), tiny(0, dropout=0.3)
    sizes = tokens_computed(model)
    rows = sum(6 + n - 1 for pair in LENGTHS for n in pair)
    simpo(dropout=True)(model, batch, Keys(0, 0, batch.slots_B))
    assert sum(sizes) >= rows
    sizes.clear()
    simpo()(model, batch, Keys(0, 0, batch.slots_B))
    assert sum(sizes) < rows


def test_rewards_are_those_of_rows_alone(tiny: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = RewardModel(tiny(0)), pairs(LENGTHS, prompt=6)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    sizes, objective = tokens_computed(model.decoder), PairwiseReward(centre=0.1).build()

    def measured() -> tuple[float, list[Tensor]]:
        model.zero_grad()
        loss = objective(model, batch, Keys(0, 0, batch.slots_B))
        loss.sum.backward()
        return float(loss.sum.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    joined = measured()
    monkeypatch.setattr(Decoder, "attends_by_document", False)
    apart = measured()
    assert sizes[0] < sizes[1]
    assert joined[0] == pytest.approx(apart[0], rel=1e-12)
    for mine, other in zip(joined[1], apart[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
