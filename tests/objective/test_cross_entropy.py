from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resilin.objective.cross_entropy import (
    CrossEntropyTerms,
    chunk_rows,
    chunked_cross_entropy,
    whole_cross_entropy,
)


def problem(n: int, d: int, v: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=dtype).requires_grad_()
    head = torch.randn(v, d, generator=g, dtype=dtype).requires_grad_()
    labels = torch.randint(v, (n,), generator=g)
    weights = torch.rand(n, generator=g, dtype=dtype)
    return hidden, head, labels, weights


def grads_of(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def by_definition(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor | None, t: CrossEntropyTerms) -> Tensor:
    logits = hidden @ head.T
    if t.softcap is not None:
        logits = t.softcap * torch.tanh(logits / t.softcap)
    per_token = F.cross_entropy(logits, labels, reduction="none", label_smoothing=t.smoothing)
    per_token = per_token + t.z_loss * torch.logsumexp(logits, -1) ** 2
    return (per_token if weights is None else per_token * weights).sum()


terms_of_any_kind = st.builds(
    CrossEntropyTerms,
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 23),
    v=st.integers(2, 17),
    rows=st.integers(1, 30),
    weighted=st.booleans(),
    terms=terms_of_any_kind,
    seed=st.integers(0, 99),
)
def test_any_chunk_size_gives_the_loss_and_gradients_of_whole_logits(
    n: int, v: int, rows: int, weighted: bool, terms: CrossEntropyTerms, seed: int
) -> None:
    hidden, head, labels, weights = problem(n, 5, v, seed)
    w = weights if weighted else None
    expected = by_definition(hidden, head, labels, w, terms)
    found = chunked_cross_entropy(hidden, head, labels, w, terms, rows).loss
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(grads_of(found, hidden, head), grads_of(expected, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("terms", [CrossEntropyTerms(), CrossEntropyTerms(0.1, 1e-4, 20.0)])
def test_float32_agrees_with_plain_cross_entropy(terms: CrossEntropyTerms) -> None:
    hidden, head, labels, _ = problem(300, 32, 500, dtype=torch.float32)
    expected = by_definition(hidden, head, labels, None, terms)
    found = chunked_cross_entropy(hidden, head, labels, None, terms, 77).loss
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads_of(found, hidden, head), grads_of(expected, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@settings(deadline=None, max_examples=30)
@given(terms=terms_of_any_kind, weighted=st.booleans(), seed=st.integers(0, 99))
def test_the_whole_and_the_chunked_form_report_the_same_sums(
    terms: CrossEntropyTerms, weighted: bool, seed: int
) -> None:
    hidden, head, labels, weights = problem(13, 6, 9, seed)
    logits = hidden @ head.T
    if terms.softcap is not None:
        logits = terms.softcap * torch.tanh(logits / terms.softcap)
    w = weights if weighted else None
    whole = whole_cross_entropy(logits, labels, w, terms)
    chunked = chunked_cross_entropy(hidden, head, labels, w, terms, 4)
    for name, a, b in zip(whole._fields, whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    assert float(chunked.hits) == float((logits.argmax(-1) == labels).sum())
    torch.testing.assert_close(chunked.nll, F.cross_entropy(logits, labels, reduction="sum"))


@settings(deadline=None, max_examples=30)
@given(z=st.floats(1e-6, 1.0), seed=st.integers(0, 99))
def test_gradient_of_the_z_loss_is_2z_log_z_softmax(z: float, seed: int) -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    eye, labels = torch.eye(11, dtype=torch.float64), torch.zeros(7, dtype=torch.int64)  # head = 1: hidden are logits

    def gradient(weight: float) -> Tensor:
        return grads_of(
            chunked_cross_entropy(logits, eye, labels, None, CrossEntropyTerms(z_loss=weight)).loss, logits
        )[0]

    log_z = torch.logsumexp(logits.detach(), -1, keepdim=True)
    expected = 2 * z * log_z * logits.detach().softmax(-1)
    torch.testing.assert_close(gradient(z) - gradient(0.0), expected, rtol=1e-10, atol=1e-10)


def test_a_constant_added_to_all_logits_moves_log_z_and_no_ranking() -> None:
    hidden, head, labels, _ = problem(9, 4, 6)
    logits, terms = (hidden @ head.T).detach(), CrossEntropyTerms(z_loss=1e-2)
    before = whole_cross_entropy(logits, labels, None, terms)
    after = whole_cross_entropy(logits + 3.0, labels, None, terms)
    torch.testing.assert_close(after.nll, before.nll)
    torch.testing.assert_close(after.log_z, before.log_z + 3.0 * 9)
    assert float(after.hits) == float(before.hits)


def test_descending_the_z_loss_pulls_log_z_to_zero_along_the_constant_direction() -> None:
    shift = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(400):
        sums = whole_cross_entropy(logits + shift, torch.zeros(3, dtype=torch.int64), None, CrossEntropyTerms(0, 0.05))
        shift = (shift - grads_of(sums.loss, shift)[0]).detach().requires_grad_()
    assert abs(float(sums.log_z)) < 1e-6  # cross-entropy itself does not feel the constant


def test_tied_embeddings_get_the_gradient_of_both_uses() -> None:
    _, table, labels, _ = problem(12, 5, 7)
    tokens = torch.arange(12) % 7
    expected = grads_of(by_definition(table[tokens].tanh(), table, labels, None, CrossEntropyTerms()), table)[0]
    table.grad = None
    chunked_cross_entropy(table[tokens].tanh(), table, labels, None, CrossEntropyTerms(), 5).loss.backward()
    torch.testing.assert_close(table.grad, expected, rtol=1e-10, atol=1e-10)


def test_a_frozen_head_costs_no_gradient_and_hidden_still_gets_its_own() -> None:
    hidden, head, labels, _ = problem(8, 4, 6)
    expected = grads_of(by_definition(hidden, head, labels, None, CrossEntropyTerms()), hidden)[0]
    frozen = head.detach()
    found = grads_of(chunked_cross_entropy(hidden, frozen, labels, None, CrossEntropyTerms(), 3).loss, hidden)[0]
    torch.testing.assert_close(found, expected)


class Largest(TorchDispatchMode):
    """The largest tensor any operation makes (views of its inputs do not count)."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, Tensor) and item.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, item.untyped_storage().nbytes() // item.element_size())
        return out


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_of_the_size_of_the_logits_is_ever_allocated(autocast: bool) -> None:
    n, d, v, rows = 64, 4, 512, 16
    hidden, head, labels, _ = problem(n, d, v, dtype=torch.float32)
    with Largest() as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        chunked_cross_entropy(hidden, head, labels, None, CrossEntropyTerms(0.1, 1e-4, 9.0), rows).loss.backward()
    assert rows * v <= seen.numel < n * v / 2
    with Largest() as seen:
        by_definition(hidden, head, labels, None, CrossEntropyTerms()).backward()
    assert seen.numel >= n * v  # the measure does see whole logits


def test_chunks_shrink_with_the_vocabulary_down_to_a_floor() -> None:
    sizes = [chunk_rows(v, "cpu") for v in (256, 4096, 32_000, 128_000, 1_000_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 128
    assert chunk_rows(32_000, "cuda") > chunk_rows(32_000, "cpu")


def test_bf16_autocast_reduces_in_float32() -> None:
    hidden, head, labels, _ = problem(40, 8, 50, dtype=torch.float32)
    rounded = hidden.detach().bfloat16().float(), head.detach().bfloat16().float()
    logits = (rounded[0] @ rounded[1].T).bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        sums = chunked_cross_entropy(hidden, head, labels, None, CrossEntropyTerms(z_loss=1e-4), 16)
    # Once the products are rounded nothing else is: log Z agrees to float32's precision, not to bf16's 2e-3.
    torch.testing.assert_close(sums.log_z.float(), torch.logsumexp(logits, -1).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.nll.float(), F.cross_entropy(logits, labels, reduction="sum"), rtol=1e-5, atol=0)
    for found, true in zip(
        grads_of(sums.loss, hidden, head),
        grads_of(by_definition(hidden, head, labels, None, CrossEntropyTerms(z_loss=1e-4)), hidden, head),
        strict=True,
    ):
        assert found.dtype == torch.float32
        assert float((found - true).norm() / true.norm()) < 1e-2


def test_ties_in_bf16_are_not_all_counted_as_hits() -> None:
    hidden, head = torch.ones(6, 2), torch.ones(5, 2)  # every logit equal: argmax takes one token of the five
    with torch.autocast("cpu", torch.bfloat16):
        sums = chunked_cross_entropy(hidden, head, torch.tensor([0, 1, 2, 3, 4, 0]), None, CrossEntropyTerms())
    assert float(sums.hits) == 2


def test_huge_logits_give_finite_losses() -> None:
    hidden = torch.tensor([[1e4, 0.0], [0.0, -1e4]], requires_grad=True)
    sums = chunked_cross_entropy(hidden, torch.eye(2), torch.tensor([1, 1]), None, CrossEntropyTerms(), 1)
    assert float(sums.loss.detach()) == pytest.approx(2e4)
    assert torch.isfinite(grads_of(sums.loss, hidden)[0]).all()


def test_no_tokens_give_zero_and_zero_gradients() -> None:
    hidden, head, labels, _ = problem(0, 4, 6)
    sums = chunked_cross_entropy(hidden, head, labels, None, CrossEntropyTerms(), 8)
    sums.loss.backward()
    assert float(sums.loss.detach()) == 0
    assert head.grad is not None
    assert not head.grad.any()


def test_a_second_backward_pass_is_refused_with_advice() -> None:
    hidden, head, labels, _ = problem(4, 3, 5)
    loss = chunked_cross_entropy(hidden, head, labels, None, CrossEntropyTerms()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"objective\.chunk = 0"):
        loss.backward()


def test_gradients_of_gradients_work_on_whole_logits_and_are_refused_on_chunks() -> None:
    hidden, head, labels, _ = problem(4, 3, 5)
    assert torch.autograd.gradgradcheck(
        lambda h, w: whole_cross_entropy(h @ w.T, labels, None, CrossEntropyTerms(0.1, 1e-2)).loss, (hidden, head)
    )
    loss = chunked_cross_entropy(hidden, head, labels, None, CrossEntropyTerms()).loss
    with pytest.raises(RuntimeError, match=r"objective\.chunk = 0"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@settings(deadline=None, max_examples=20)
@given(factor=st.floats(-30, 30), rows=st.integers(1, 12), kept=st.integers(0, 11), seed=st.integers(0, 99))
def test_all_gradients_grow_with_a_factor_of_the_loss(factor: float, rows: int, kept: int, seed: int) -> None:
    """The head's too, which is made in the forward pass, before the factor is known; some chunks weigh nothing."""
    found = []
    for scale in (1.0, factor):
        hidden, head, labels, weights = problem(12, 5, 9, seed)
        weights = weights * (torch.arange(12) < kept)
        loss = chunked_cross_entropy(hidden, head, labels, weights, CrossEntropyTerms(z_loss=0.1), rows).loss
        found.append(grads_of(loss * scale, hidden, head))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a * factor, rtol=1e-12, atol=1e-12)


def test_without_grad_mode_no_gradient_is_made() -> None:
    hidden, head, labels, _ = problem(16, 4, 64)
    with torch.no_grad(), Largest() as seen:
        sums = chunked_cross_entropy(hidden, head, labels, None, CrossEntropyTerms(), 2)
    assert not sums.loss.requires_grad
    assert seen.numel < head.numel()
