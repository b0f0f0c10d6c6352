"""Losses over a vocabulary that is divided among ranks: the numbers and gradients of the whole one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from forked import run_ranks
from torch import Tensor

from resilin.config import UserError
from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.nouns import Batch
from resilin.objective.cross_entropy import CrossEntropyTerms, chunked_cross_entropy, whole_cross_entropy
from resilin.objective.distill import Distilled, DistilledLoss
from resilin.objective.vocabulary import VocabularyShard
from resilin.parallel.group import Group
from resilin.parallel.local_model import LocalModel
from resilin.parallel.tensor import parallelise
from resilin.parallel.tensor.vocabulary import vocabulary_shard
from resilin.posttrain.logprob_loss import Head, chunked_label_logprobs, chunked_logprob_loss, whole_logprob_loss
from resilin.posttrain.preference_loss import Preference

N, D, V = 13, 6, 11


def numbers(vocabulary: int = V) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(N, D, generator=g).requires_grad_()
    head = torch.randn(vocabulary, D, generator=g).requires_grad_()
    return hidden, head, torch.randint(vocabulary, (N,), generator=g), torch.rand(N, generator=g)


def own_rows(head: Tensor, group: Group, padding: int = 0) -> tuple[Tensor, VocabularyShard]:
    """This rank's rows as a leaf, with NaN behind them where padding is asked for."""
    sizes = [len(part) for part in head.tensor_split(group.size)]
    start = sum(sizes[: group.index])
    own = head.detach()[start : start + sizes[group.index]]
    own = torch.cat([own, own.new_full((padding, own.shape[1]), torch.nan)])
    return own.clone().requires_grad_(), vocabulary_shard(start, sizes[group.index], len(head), group)


def close(found: Any, wanted: Any) -> None:
    found, wanted = (torch.as_tensor(x).double() for x in (found, wanted))
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm()), (found, wanted)


def cross_entropy(rank: int) -> None:
    group = Group.of()
    for smoothing, z_loss, softcap, weighted, rows in product(
        (0, 0.2), (0, 0.1), (None, 2.0), (False, True), (None, 4)
    ):
        terms = CrossEntropyTerms(smoothing, z_loss, softcap)
        hidden, head, labels, weights = numbers()
        given = weights if weighted else None
        logits = hidden @ head.t()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        wanted = whole_cross_entropy(logits, labels, given, terms)
        (2 * wanted.loss).backward()
        again = hidden.detach().clone().requires_grad_()
        own, shard = own_rows(head, group, padding=rank)
        found = chunked_cross_entropy(again, own, labels, given, terms, rows, shard)
        (2 * found.loss).backward()
        close([x.detach() for x in found], [x.detach() for x in wanted])
        close(again.grad, hidden.grad)
        assert head.grad is not None
        assert own.grad is not None
        close(own.grad[: shard.size], head.grad[shard.start : shard.start + shard.size])
        assert not own.grad[shard.size :].any()  # padding


def ties(rank: int) -> None:
    """Products in bfloat16 tie often: the first of the largest is the prediction, whichever rank has it."""
    group = Group.of()
    hidden = torch.ones(6, 2)
    head = torch.tensor([[1.0, 0], [2, 0], [0, 0], [2, 0], [1, 0], [2, 0], [0, 1]])
    own, shard = own_rows(head, group)
    labels = torch.tensor([1, 3, 5, 1, 0, 6])
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_cross_entropy(hidden, own, labels, None, CrossEntropyTerms(), None, shard)
        whole = chunked_cross_entropy(hidden, head, labels, None, CrossEntropyTerms())
    assert float(found.hits) == float(whole.hits) == 2


def logprobs(rank: int) -> None:
    group, groups = Group.of(), [4, 1, 6, 2]

    def score(values: Tensor, part: Any) -> Tensor:
        return (values.double() - 0.3).pow(2).sum()

    for softcap, temperature, rows in product((None, 2.0), (1.0, 0.7), (None, 5)):
        hidden, head, labels, _ = numbers()
        wanted = whole_logprob_loss(Head(head, softcap, temperature).logits(hidden), labels, groups, score)
        wanted.backward()
        again = hidden.detach().clone().requires_grad_()
        own, shard = own_rows(head, group)
        local = Head(own, softcap, temperature, shard)
        found = chunked_logprob_loss(again, local, labels, groups, score, rows)
        found.backward()
        close(found.detach(), wanted.detach())
        close(again.grad, hidden.grad)
        assert head.grad is not None
        close(own.grad, head.grad[shard.start : shard.start + shard.size])
        whole = chunked_label_logprobs(hidden, Head(head, softcap, temperature), labels)
        close(chunked_label_logprobs(again, local, labels), whole)
    with pytest.raises(UserError, match="leave objective"):
        local.logits(hidden)


SETTINGS = DecoderSettings(vocab_size=13, hidden_size=8, layers=1, heads=4, mlp_size=8, logit_softcap=3.0)


def batch() -> Batch:
    g = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(13, (2, 6), generator=g) for _ in range(2))
    return Batch(torch.arange(2), {"tokens": tokens, "labels": labels})


def learns_alike(whole: Decoder, local: LocalModel, loss: Callable[..., torch.Tensor]) -> None:
    """A loss and its gradients on the ranks are those of the whole model."""
    wanted, found = loss(whole), loss(local.module)
    wanted.backward()
    found.backward()
    local.sum_gradients()
    close(found.detach(), wanted.detach())
    for (name, ours), theirs in zip(local.module.named_parameters(), whole.parameters(), strict=True):
        assert theirs.grad is not None
        close(ours.grad, local.part(name, theirs.grad))


def other_losses(rank: int) -> None:
    """Whole logits are put together where a loss asks for them; the chunked distillation refuses by name."""
    group = Group.of()
    whole = Decoder(SETTINGS, seed=1)
    model = Decoder(SETTINGS, seed=1)
    local = parallelise(model, model.tensor_plan(), group, sequence=False)
    teacher = Decoder(SETTINGS, seed=2).requires_grad_(False)
    keys = Keys(0, 0, torch.arange(2))
    with pytest.raises(UserError, match=r"chunk = 0.* 13 tokens are divided among 2 ranks"):
        DistilledLoss(Distilled(), teacher)(local.module, batch(), keys)
    objective = DistilledLoss(Distilled(chunk=0), teacher)
    learns_alike(whole, local, lambda model: objective(model, batch(), keys).sum)


def preferences(rank: int) -> None:
    """Pairs whose prompts are computed once, in rows that do not divide."""
    group, g = Group.of(), torch.Generator().manual_seed(3)
    prompt = torch.randint(13, (2, 3), generator=g)
    fields = {}
    for side, width in (("chosen", 7), ("rejected", 6)):
        answer = torch.randint(13, (2, width - 3), generator=g)
        fields[f"{side}_tokens"] = torch.cat([prompt, answer], 1)
        fields[f"{side}_labels"] = torch.cat([torch.full((2, 2), -100), answer, torch.full((2, 1), 4)], 1)
    pairs = Batch(torch.arange(2), fields)
    for sequence in (False, True):
        whole, model = (Decoder(SETTINGS, seed=1) for _ in range(2))
        local = parallelise(model, model.tensor_plan(), group, sequence=sequence)
        objective = Preference(loss="simpo").build(None)
        learns_alike(whole, local, lambda model, o=objective: o(model, pairs, None).sum)


def test_preferences_are_learned_alike() -> None:
    run_ranks(2, preferences)


@pytest.mark.parametrize("ranks", [2, 3])
def test_cross_entropy_is_that_of_the_whole_vocabulary(ranks: int) -> None:
    run_ranks(ranks, cross_entropy)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_first_of_equal_logits_is_the_prediction(ranks: int) -> None:
    run_ranks(ranks, ties)


def test_losses_of_log_probabilities_are_those_of_the_whole_vocabulary() -> None:
    run_ranks(3, logprobs)


def test_other_losses_get_whole_logits_or_refuse() -> None:
    run_ranks(2, other_losses)
