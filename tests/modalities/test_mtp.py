"""Modules that predict the tokens after the next one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resilin.keys import Keys
from resilin.modalities.model import GroupDecoder, GroupDecoderSettings
from resilin.modalities.mtp import MtpSettings, further
from resilin.modalities.objective import NextGroup
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.plain import make_plain
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken

V, T = 11, 12


def model_of(depth: int = 2, **changes: Any) -> GroupDecoder:
    own = DecoderSettings(vocab_size=V, hidden_size=16, layers=2, heads=2, init_std=0.3, **changes)
    settings = GroupDecoderSettings(decoder=own, mtp=MtpSettings(depth=depth))
    return settings.build(ModelContext(0, None)).double()


def text(rows: int = 2, seed: int = 0) -> Batch:
    stream = torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(seed))
    documents_BT = torch.zeros(rows, T, dtype=torch.int64)
    documents_BT[0, 7:] = 1
    labels_BT = stream[:, 1:].clone()
    labels_BT[0, 6] = -100
    positions_BT = torch.arange(T).repeat(rows, 1)
    positions_BT[0, 7:] -= 7
    fields = {"tokens": stream[:, :-1], "labels": labels_BT, "documents": documents_BT, "positions": positions_BT}
    return Batch(torch.arange(rows), fields)


def keys_of(batch: Batch) -> Keys:
    return Keys(0, 0, batch.slots_B)


def test_what_is_asked_further_on_stays_in_its_document() -> None:
    batch = text()
    found = further(batch, 2)
    for b in range(2):
        for t in range(T):
            inside = t + 2 < T and batch["documents"][b, t] == batch["documents"][b, t + 2]
            assert bool(found.there_BT[b, t]) == bool(inside)
            assert int(found.labels_BT[b, t]) == (int(batch["labels"][b, t + 2]) if inside else -100)
            assert int(found.tokens_BT[b, t]) == (int(batch["tokens"][b, t + 2]) if inside else 0)
    picture_BT = torch.ones(2, T, dtype=torch.bool)
    picture_BT[1, 5] = False
    there = further(batch, 2, picture_BT).there_BT[1].tolist()
    assert [t for t in range(T - 2) if not there[t]] == [3, 4, 5]


def further_states(model: GroupDecoder, batch: Batch) -> list[Tensor]:
    hidden = model(batch["tokens"], batch["positions"], batch["documents"]).hidden_BTD
    asked = [further(batch, depth) for depth in (1, 2)]
    ahead = [(one.tokens_BT, one.there_BT) for one in asked]
    return model.further(hidden, ahead, batch["positions"], batch["documents"], None, None)[0]


def test_depth_k_sees_k_tokens_more_and_none_beyond() -> None:
    model, batch = model_of(), text()
    before = further_states(model, batch)
    changed = batch["tokens"].clone()
    changed[1, 8] = (changed[1, 8] + 1) % V
    after = further_states(model, Batch(batch.slots_B, {**batch.fields, "tokens": changed}))
    for depth, (old, new) in enumerate(zip(before, after, strict=True), 1):
        moved = (old[1] != new[1]).any(1).tolist()
        assert not any(moved[: 8 - depth])
        assert all(moved[8 - depth :][:2])


def test_the_loss_is_next_token_and_a_weighted_mean_of_depths() -> None:
    model, batch = model_of(), text()
    plain = NextToken().build()(model.decoder, batch, None)
    found = NextGroup(mtp_weight=0.4).build()(model, batch, keys_of(batch))
    states, expected = further_states(model, batch), plain.sum
    for depth, state in enumerate(states, 1):
        labels_BT = further(batch, depth).labels_BT
        logits = state @ model.head_weight.t()
        own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), reduction="sum")
        torch.testing.assert_close(found.logs[f"mtp_{depth}"].sum, own.detach().double(), rtol=1e-9, atol=0)
        expected = expected + 0.4 / 2 * own
    torch.testing.assert_close(found.sum, expected, rtol=1e-9, atol=0)
    assert float(found.units) == float(plain.units) == 2 * T - 1
    held_out = NextGroup().build()(model, batch, None)
    torch.testing.assert_close(held_out.sum, plain.sum)


def test_without_weight_it_is_next_token_with_its_gradients() -> None:
    model, batch = model_of(), text()
    NextGroup(mtp_weight=0.0).build()(model, batch, keys_of(batch)).sum.backward()
    found = {name: p.grad for name, p in model.decoder.named_parameters()}
    assert all(p.grad is None for p in model.mtp.parameters())
    alone = model_of()
    NextToken().build()(alone.decoder, batch, keys_of(batch)).sum.backward()
    for name, parameter in alone.decoder.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-13)  # products have other shapes


@pytest.mark.parametrize("chunk", [0, 3])
def test_micro_batches_and_chunks_change_nothing(chunk: int) -> None:
    batch, sums, gradients = text(4), [], []
    for size in (4, 1):
        model, total = model_of(moe={"experts": 4, "expert_size": 8}), 0.0
        loss = NextGroup(chunk=chunk, z_loss=1e-3, label_smoothing=0.1).build()
        for at in range(0, 4, size):
            part = batch.rows(at, at + size)
            found = loss(model, part, keys_of(part))
            found.sum.backward()
            total += float(found.sum)
        sums.append(total)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert sums[0] == pytest.approx(sums[1], rel=1e-9)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-8, atol=1e-10)


def test_an_export_is_the_decoder_alone() -> None:
    model = model_of()
    plain = make_plain(model)
    assert type(plain) is Decoder
    assert not [name for name in plain.state_dict() if "mtp" in name]


def test_weights_of_tokens_go_with_their_labels() -> None:
    model, batch = model_of(1), text()
    weights_BT = torch.rand(2, T, dtype=torch.float64).where(batch["labels"] != -100, 0)
    weighed = Batch(batch.slots_B, {**batch.fields, "weights": weights_BT})
    found = NextGroup(mtp_weight=1.0).build()(model, weighed, keys_of(batch))
    plain = NextToken().build()(model.decoder, weighed, None)
    state, labels_BT = further_states_of_one(model, batch), further(batch, 1).labels_BT
    nll = torch.nn.functional.cross_entropy((state @ model.head_weight.t()).flatten(0, 1), labels_BT.flatten(),
                                            reduction="none", ignore_index=-100)  # fmt: skip
    moved = torch.cat((weights_BT[:, 1:], torch.zeros(2, 1, dtype=torch.float64)), 1)
    torch.testing.assert_close(found.sum, plain.sum + (nll * moved.flatten()).sum(), rtol=1e-9, atol=0)
    assert float(found.units) == pytest.approx(float(weights_BT.sum()))


def further_states_of_one(model: GroupDecoder, batch: Batch) -> Tensor:
    hidden = model(batch["tokens"], batch["positions"], batch["documents"]).hidden_BTD
    one = further(batch, 1)
    found: Tensor = model.further(
        hidden, [(one.tokens_BT, one.there_BT)], batch["positions"], batch["documents"], None, None
    )[0][0]
    return found
