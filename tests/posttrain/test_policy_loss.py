from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resilin.posttrain.logprob_loss import Part
from resilin.posttrain.policy_loss import PolicyTerms, PolicyTokens
from resilin.posttrain.rollout import Answer, rows_of
from resilin.posttrain.sequences import frozen_logprobs, label_states


def rows(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    answers = []
    for length in lengths:
        draw = torch.randint(17, (length + 3,), generator=generator).tolist()
        answers.append(Answer(draw[:3], draw[3:], [-1.0] * length, True))
    return rows_of(answers)


def tokens_of(fields: dict[str, Tensor], seed: int = 0, spread: float = 0.5, **more: Any) -> PolicyTokens:
    generator = torch.Generator().manual_seed(seed)
    count = int((fields["labels"] != -100).sum())
    advantage = torch.randn(count, generator=generator, dtype=torch.float64)
    return PolicyTokens(advantage, torch.rand(count, generator=generator, dtype=torch.float64), **more)


def by_hand(logp: Tensor, tokens: PolicyTokens, terms: PolicyTerms) -> Tensor:
    old = logp.detach() if tokens.old_N is None else tokens.old_N
    ratio = (logp - old).exp()
    bounded = ratio.clamp(1 - terms.clip_low, 1 + terms.clip_high)
    loss = -torch.minimum(tokens.advantage_N * ratio, tokens.advantage_N * bounded)
    if tokens.reference_N is not None:
        d = logp - tokens.reference_N
        loss = loss + terms.beta * ((-d).exp() - 1 + d)
    return (loss * tokens.weight_N).sum()


@pytest.mark.parametrize("chunk", [None, 0, 3])
def test_loss_and_gradient_by_hand(tiny: Any, chunk: int | None) -> None:
    policy, fields = tiny(0), rows([4, 9, 2])
    terms = PolicyTerms(0.1, 0.3, 0.05)
    logp = frozen_logprobs(policy, fields["tokens"], fields["labels"])
    noise = torch.randn(len(logp), generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.4
    tokens = tokens_of(fields, old_N=logp + noise, reference_N=logp - noise / 2)
    states = label_states(policy, fields["tokens"], fields["labels"])
    loss, logs = terms.loss(states, tokens, chunk)
    loss.backward()
    found = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    again = label_states(policy, fields["tokens"], fields["labels"])
    direct = policy.logits(again.states_ND).log_softmax(-1).gather(1, again.labels_N[:, None])[:, 0]
    expected = by_hand(direct, tokens, terms)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for a, p in zip(found, policy.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-11)
    ratio = (-noise).exp()
    outside = ((ratio > 1.3) & (tokens.advantage_N > 0)) | ((ratio < 0.9) & (tokens.advantage_N < 0))
    assert logs["clipped"].value() == pytest.approx(float(outside.double().mean()))
    assert logs["ratio"].value() == pytest.approx(float(ratio.mean()))


class StatesOf:
    """Log-probabilities that are given, in place of a model's states."""

    def __init__(self, logp_N: Tensor) -> None:
        self.logp_N, self.labels_N = logp_N, torch.zeros(len(logp_N))

    def loss(self, groups: list[int], score: Any, chunk: int | None) -> Tensor:
        return score(self.logp_N, Part(slice(0, len(self.logp_N)), slice(0, len(groups))))


def test_beyond_the_bounds_a_token_has_no_gradient() -> None:
    logp = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    tokens = PolicyTokens(advantage, torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))

    loss, _ = PolicyTerms(0.2, 0.2).loss(StatesOf(logp), tokens)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(loss, logp)
    assert grad.tolist()[:2] == [0.0, 0.0]  # already moved as far as they may
    assert all(grad[2:] != 0)  # moved the wrong way: they may come back


@pytest.mark.parametrize("chunk", [None, 0, 3])
def test_the_ratio_of_whole_answers_by_hand(tiny: Any, chunk: int | None) -> None:
    policy, fields = tiny(0), rows([4, 9, 2])
    terms = PolicyTerms(0.05, 0.05, 0.0, whole_answers=True)
    logp = frozen_logprobs(policy, fields["tokens"], fields["labels"])
    noise = torch.randn(len(logp), generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.4
    tokens = tokens_of(fields, old_N=logp + noise)
    states = label_states(policy, fields["tokens"], fields["labels"])
    loss, logs = terms.loss(states, tokens, chunk)
    loss.backward()
    found = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    again = label_states(policy, fields["tokens"], fields["labels"])
    direct = policy.logits(again.states_ND).log_softmax(-1).gather(1, again.labels_N[:, None])[:, 0]
    expected = torch.zeros((), dtype=torch.float64)
    clipped = 0
    for part in (slice(0, 4), slice(4, 13), slice(13, 15)):  # Zheng et al., GSPO, 2025, equations 5 and 7
        ratio = (direct[part] - tokens.old_N[part]).mean().exp()
        bounded = ratio.clamp(0.95, 1.05)
        advantage, weight = tokens.advantage_N[part], tokens.weight_N[part]
        expected = expected - (torch.minimum(ratio * advantage, bounded * advantage) * weight).sum()
        clipped += int((bounded * advantage < ratio * advantage).sum())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for a, p in zip(found, policy.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-11)
    assert logs["clipped"].value() == pytest.approx(clipped / 15)
    assert clipped > 0


def test_the_second_bound_holds_only_the_loss_of_negative_advantages() -> None:
    logp = torch.tensor([2.0, 2.0, 0.5, -2.0], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([-1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    tokens = PolicyTokens(advantage, torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))

    free, _ = PolicyTerms(0.2, 0.2).loss(StatesOf(logp), tokens)  # type: ignore[arg-type]
    bound, logs = PolicyTerms(0.2, 0.2, clip_dual=3.0).loss(StatesOf(logp), tokens)  # type: ignore[arg-type]
    assert float((free - bound).detach()) == pytest.approx(2.718281828459045**2 - 3.0)
    (grad,) = torch.autograd.grad(bound, logp)
    assert [value != 0 for value in grad.tolist()] == [False, False, True, False]
    assert logs["clipped"].value() == 0.75


def test_where_the_policy_has_not_moved_the_gradient_is_that_of_policy_gradients(tiny: Any) -> None:
    policy, fields = tiny(0), rows([3, 5])
    tokens = tokens_of(fields)
    states = label_states(policy, fields["tokens"], fields["labels"])
    loss, logs = PolicyTerms().loss(states, tokens)
    loss.backward()
    found = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    again = label_states(policy, fields["tokens"], fields["labels"])
    logp = policy.logits(again.states_ND).log_softmax(-1).gather(1, again.labels_N[:, None])[:, 0]
    (-(logp * tokens.advantage_N * tokens.weight_N).sum()).backward()
    for a, p in zip(found, policy.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-11)
    assert logs["ratio"].value() == 1.0
    assert logs["clipped"].value() == 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rows_split_over_calls_and_padding_change_nothing(
    tiny: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resilin.posttrain import sequences

    policy, fields = tiny(0, attention_backend="eager"), rows([2, 30, 1, 14, 15])
    assert not sequences.joins_rows(policy, None)
    labels = fields["labels"]
    whole = label_states(policy, fields["tokens"], labels, None, temperature)
    monkeypatch.setitem(sequences._FEW_POSITIONS, "cpu", 1)
    split = label_states(policy, fields["tokens"], labels, None, temperature)
    assert len(sequences.split_by_length([5, 33, 4, 17, 18], 1)) > 1
    torch.testing.assert_close(split.states_ND, whole.states_ND, rtol=1e-12, atol=1e-12)
    assert split.counts == whole.counts == [2, 30, 1, 14, 15]
    expected = policy.logits(whole.states_ND).div(temperature).log_softmax(-1).gather(1, whole.labels_N[:, None])[:, 0]
    torch.testing.assert_close(split.logprobs(), expected.detach())


def test_rows_hold_prompt_and_answer_shifted_by_one() -> None:
    fields = rows_of([Answer([5, 6], [7, 2], [-0.5, -0.25], True), Answer([4], [9], [-1.0], False)])
    assert fields["tokens"].tolist() == [[5, 6, 7], [4, 0, 0]]
    assert fields["labels"].tolist() == [[-100, 7, 2], [9, -100, -100]]
    assert fields["old_logprobs"].tolist() == [[0, -0.5, -0.25], [-1.0, 0, 0]]
