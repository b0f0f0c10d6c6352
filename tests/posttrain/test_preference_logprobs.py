from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resilin.posttrain.logprob_loss import (
    Head,
    Part,
    chunked_label_logprobs,
    chunked_logprob_loss,
    label_logprobs,
    plan,
    whole_logprob_loss,
)

V, D = 13, 5


def made(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, D, generator=g, dtype=dtype).requires_grad_()
    head = torch.randn(V, D, generator=g, dtype=dtype).requires_grad_()
    return hidden, head, torch.randint(V, (n,), generator=g)


def of_groups(groups: list[int]) -> Any:
    """A loss that couples all tokens of a group: the square of the group's sum, so that no token stands alone."""

    def score(logp: Tensor, part: Part) -> Tensor:
        sums = torch.stack([piece.sum() for piece in logp.split(groups[part.groups])])
        return (sums.square() * 0.1 + sums).sum()

    return score


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [1, 3, 7, 64])
def test_loss_and_gradients_equal_those_of_whole_logits(softcap: float | None, temperature: float, rows: int) -> None:
    groups = [4, 0, 9, 2, 5]
    hidden, weight, labels = made(sum(groups))
    head = Head(weight, softcap, temperature)
    expected = whole_logprob_loss(head.logits(hidden), labels, groups, of_groups(groups))
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    loss = chunked_logprob_loss(hidden, head, labels, groups, of_groups(groups), rows)
    found = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 12))
@settings(max_examples=60)
def test_parts_hold_whole_groups_in_order_and_no_more_than_a_chunk(groups: list[int], rows: int) -> None:
    parts = list(plan(groups, rows))
    assert [g for p in parts for g in range(p.groups.start, p.groups.stop)] == list(range(len(groups)))
    at = 0
    for part in parts:
        size = sum(groups[part.groups])
        assert (part.tokens.start, part.tokens.stop) == (at, at + size)
        assert size <= rows or sum(1 for g in groups[part.groups] if g) == 1
        at += size


def test_logprobs_without_gradients_are_those_of_log_softmax() -> None:
    hidden, weight, labels = made(11)
    expected = (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    for rows in (1, 4, 50):
        torch.testing.assert_close(chunked_label_logprobs(hidden, Head(weight), labels, rows), expected.detach())
    torch.testing.assert_close(label_logprobs(hidden @ weight.T, labels), expected)


def test_autocast_reduces_in_float32_and_keeps_the_parameters_format() -> None:
    hidden, weight, labels = made(8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_logprob_loss(hidden, Head(weight), labels, [8], of_groups([8]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    exact = whole_logprob_loss(hidden @ weight.T, labels, [8], of_groups([8]))
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.05)


def test_never_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = made(40)
    sizes = []
    original = torch.mm

    def watched(a: Tensor, b: Tensor, **more: Any) -> Tensor:
        result = original(a, b, **more)
        sizes.append(tuple(result.shape))
        return result

    monkeypatch.setattr(torch, "mm", watched)
    chunked_logprob_loss(hidden, Head(weight), labels, [40], of_groups([40]), 6).backward()
    assert max(rows for rows, columns in sizes if columns == V) <= 6


def test_it_is_differentiated_once_and_says_so() -> None:
    hidden, weight, labels = made(4)
    loss = chunked_logprob_loss(hidden, Head(weight), labels, [4], of_groups([4]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
    again = chunked_logprob_loss(hidden, Head(weight), labels, [4], of_groups([4]))
    with pytest.raises(RuntimeError, match="chunk = 0"):
        torch.autograd.grad(again, hidden, create_graph=True)


def test_groups_must_hold_all_tokens() -> None:
    hidden, weight, labels = made(4)
    with pytest.raises(ValueError, match="3 tokens, but 4 labels"):
        chunked_logprob_loss(hidden, Head(weight), labels, [3], of_groups([3]))


def test_a_constant_loss_has_zero_gradients() -> None:
    hidden, weight, labels = made(4)
    chunked_logprob_loss(hidden, Head(weight), labels, [4], lambda logp, part: torch.zeros(())).backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
