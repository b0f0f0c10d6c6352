"""NICE: the gradient of a reward, by responses that the model wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.steer.nice import NICE, prompt_and_reference
from resilin.steer.rewards import Overlap, Reward
from resilin.steer.sample_gradients import sample_gradients
from resilin.steer.selector import SelectionError


def test_a_sample_is_cut_where_its_labels_begin() -> None:
    assert prompt_and_reference([1, 2, 3, 4], [-100, -100, 4, 5], 32) == ([1, 2, 3], [4, 5])
    assert prompt_and_reference([1, 2, 3, 4], [2, 3, 4, 5], 2) == ([1, 2], [3, 4, 5])
    assert prompt_and_reference([1, 2, 3, 0], [2, 3, -100, -100], 32) == ([1], [2, 3])
    assert prompt_and_reference([1, 2], [-100, -100], 2) == ([], [])


def test_overlap_is_f1() -> None:
    assert Overlap().score([[1, 1, 2], [3], []], [[1, 2, 4], [5], [6]], None) == [pytest.approx(4 / 6), 0.0, 0.0]


class ByLength(Reward):
    value: float = 1.0

    def score(self, responses: Sequence[list[int]], references: Sequence[list[int]], tokenizer: Any) -> list[float]:
        seen.append(list(responses))
        return [self.value * (0.25 + 0.5 * (number % 2)) for number in range(len(responses))]


seen: list[list[list[int]]] = []


def test_the_policy_gradient_is_reward_times_summed_likelihood_averaged(kit: Any) -> None:
    target = kit.RowPool((2,), seed=4)
    look = kit.make_look(kit.RowPool((10,)), 3, target=target)
    nice = NICE(dimensions=0, responses=2, max_new_tokens=3, prompt_tokens=4, reward=ByLength())
    seen.clear()
    found, mean = nice.policy_gradients(look)
    assert mean == 0.5
    assert [len(response) for response in seen[0]] == [3, 3, 3, 3]
    prompt = target.rows_NT[1, :4].tolist()
    expected = 0.0
    for reward, response in zip((0.25, 0.75), seen[0][2:], strict=True):
        row = torch.tensor([prompt + response])
        labels = row[:, 1:].clone()
        labels[:, :3] = -100
        batch = Batch(torch.arange(1), {"tokens": row[:, :-1], "labels": labels})
        parts = sample_gradients(look.model, NextToken().build(), batch, reduce="sum", way="loop")
        expected = expected + reward / 2 * torch.cat([part.flatten() for part in parts.values()])
    torch.testing.assert_close(found[1], expected, rtol=1e-3, atol=1e-5)
    again, _ = nice.policy_gradients(look)
    assert torch.equal(found, again)


def test_it_selects_and_reports_the_reward(kit: Any) -> None:
    look = kit.make_look(kit.RowPool((10, 10)), 3, target=kit.RowPool((2,)))
    made = NICE(direction="sgd", dimensions=16, responses=2, max_new_tokens=2, reward=ByLength(), baseline=True).select(
        look
    )
    assert len(set(torch.as_tensor(made.samples).tolist())) == 3
    assert made.metrics["mean reward"] == 0.5


def test_rewards_that_say_nothing_or_too_much_are_refused(kit: Any) -> None:
    look = kit.make_look(kit.RowPool((10,)), 3, target=kit.RowPool((2,)))
    with pytest.raises(SelectionError, match=r"no response got a reward"):
        NICE(dimensions=8, responses=2, max_new_tokens=2, reward=ByLength(value=0.0)).select(look)
    with pytest.raises(SelectionError, match=r"reward ByLength should give a number in \[0, 1\].*1.5"):
        NICE(dimensions=8, responses=2, max_new_tokens=2, reward=ByLength(value=2.0)).select(look)
