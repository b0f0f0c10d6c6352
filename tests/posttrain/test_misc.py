"""MISC and WPSM: how far a draw is from training, and what is learnt already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resilin.posttrain.grpo import Grpo
from resilin.posttrain.logprob_loss import Part
from resilin.posttrain.policy import masked_importance
from resilin.posttrain.policy_loss import PolicyTerms, PolicyTokens, rows_to_tokens
from resilin.posttrain.well_learned import WellLearned, answer_entropies

BAND = (0.5, 2.0)


class Given:
    """Log-probabilities that are given, in place of a model's states."""

    def __init__(self, logp_N: Tensor, counts: list[int]) -> None:
        self.logp_N, self.labels_N, self.counts = logp_N, torch.zeros(len(logp_N)), counts

    def loss(self, groups: list[int], score: Any, chunk: int | None) -> Tensor:
        return score(self.logp_N, Part(slice(0, len(self.logp_N)), slice(0, len(groups))))


def drawn(counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New and old log-probabilities of training, those of the draws, and an advantage for each answer."""
    generator = torch.Generator().manual_seed(seed)
    new, old, infer = (torch.randn(sum(counts), generator=generator, dtype=torch.float64) * 0.4 - 1 for _ in range(3))
    return new, old, infer, torch.randn(len(counts), generator=generator, dtype=torch.float64)


def importance(old: Tensor, infer: Tensor, counts: list[int], over: Any = "token") -> Tensor:
    """Of the tokens, by way of rows as a rollout has them."""
    labelled = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    gained = torch.zeros(labelled.shape, dtype=torch.float64)
    gained[labelled] = old - infer
    return masked_importance(gained, labelled, BAND, over)[labelled]


def loss_of(counts: list[int], new: Tensor, old: Tensor, weight: Tensor, advantage: Tensor, **terms: Any) -> Tensor:
    leaf = new.clone().requires_grad_()
    per_answer = 1 / rows_to_tokens(torch.tensor(counts, dtype=torch.float64), counts)
    tokens = PolicyTokens(rows_to_tokens(advantage, counts), weight * per_answer, old)
    loss, _ = PolicyTerms(0.2, 0.2, **terms).loss(Given(leaf, counts), tokens)  # type: ignore[arg-type]
    return torch.cat((loss.detach()[None], torch.autograd.grad(loss, leaf)[0]))


def test_the_objective_of_the_paper_by_hand() -> None:
    counts = [3, 7, 1, 5]
    new, old, infer, advantage = drawn(counts)
    leaf, expected, at = new.clone().requires_grad_(), torch.zeros(()).double(), 0
    for i, count in enumerate(counts):
        part = slice(at, at + count)
        ratio = torch.exp((leaf[part] - old[part]).mean())
        clipped = torch.minimum(ratio * advantage[i], ratio.clamp(0.8, 1.2) * advantage[i])
        terms = []
        for j in range(count):
            k = torch.exp(old[part][j] - infer[part][j])
            terms.append((k if BAND[0] <= k <= BAND[1] else torch.zeros(())) * clipped)
        expected = expected - torch.stack(terms).mean()
        at += count
    gradient = torch.autograd.grad(expected, leaf)[0]
    weight = importance(old, infer, counts)
    assert bool((weight == 0).any())
    found = loss_of(counts, new, old, weight, advantage, whole_answers=True)
    torch.testing.assert_close(found, torch.cat((expected.detach()[None], gradient)))


def test_draws_of_the_training_policy_give_gspo() -> None:
    counts = [3, 7, 1, 5]
    new, old, _, advantage = drawn(counts)
    weight = importance(old, old, counts)
    assert torch.equal(weight, torch.ones_like(weight))
    ones = torch.ones_like(old)
    gspo = loss_of(counts, new, old, ones, advantage, whole_answers=True)
    assert torch.equal(loss_of(counts, new, old, weight, advantage, whole_answers=True), gspo)


def test_answers_of_one_token_give_grpo_with_icepop() -> None:
    counts = [1] * 40
    new, old, infer, advantage = drawn(counts, seed=4)
    weight = importance(old, infer, counts)
    assert 0 < int((weight == 0).sum()) < 40
    misc = loss_of(counts, new, old, weight, advantage, whole_answers=True)
    icepop = loss_of(counts, new, old, weight, advantage, whole_answers=False)
    torch.testing.assert_close(misc, icepop)
    by_answer = importance(old, infer, counts, "answer")
    assert torch.equal(by_answer, weight)  # with one token each, answers and tokens are masked alike


def test_a_whole_answer_goes_where_its_mean_is_outside() -> None:
    gained = torch.tensor([[1.0, 1.0, 1.0], [1.5, -1.5, 0.0], [0.1, 0.2, 0.0]], dtype=torch.float64)
    labelled = torch.tensor([[True] * 3, [True] * 3, [True, True, False]])
    by_token = masked_importance(gained, labelled, BAND)
    by_answer = masked_importance(gained, labelled, BAND, "answer")
    assert (by_token > 0).tolist() == [[False] * 3, [False, False, True], [True, True, False]]
    assert (by_answer > 0).tolist() == [[False] * 3, [True] * 3, [True, True, False]]
    torch.testing.assert_close(by_answer[1], gained[1].exp())


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"importance_band": (0.5, 0.9)}, "alpha <= 1 <= beta"),
        ({"importance_band": (0.5, 2.0), "importance_cap": 2.0}, "set one of them"),
        ({"importance_band": (0.5, 2.0), "old_logprobs": "sampled"}, "auto or recomputed"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Grpo(**settings)


def test_well_learned_is_what_is_sure_and_mostly_right() -> None:
    entropy = torch.tensor([0.01, 0.5, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01])
    verified = torch.tensor([1.0, 1, 1, 0, 1, 0, 1, 0])
    found = WellLearned(entropy=0.1, success=0.6).found(entropy, verified, 4)
    assert found.tolist() == [True, False, True, True, False, False, False, False]
    assert not bool(WellLearned(entropy=0.1, success=0.75).found(entropy, verified, 4).any())  # 3 of 4 is not more


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_are_means_over_the_tokens_of_answers(tiny: Any, temperature: float) -> None:
    model = tiny(0)
    tokens = torch.randint(17, (3, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.full((3, 8), -100)
    labels[0, 2:5], labels[1, 1:8] = 3, 4
    found = answer_entropies(model, tokens, labels, temperature)
    logp = (model.logits(model(tokens).hidden_BTD) / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    expected = torch.stack((entropy[0, 2:5].mean(), entropy[1, 1:8].mean(), torch.zeros(()).double()))
    torch.testing.assert_close(found, expected.detach())
