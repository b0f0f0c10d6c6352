from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resilin.objective.router_loss import micro_batch_load_balance, router_z, sequence_load_balance


def logits_of(layers: int, b: int, t: int, e: int, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, t, e, generator=g) for _ in range(layers))


def test_balanced_routing_costs_exactly_one() -> None:
    T, E = 8, 4
    turns = torch.eye(E).repeat(T // E, 1)[None] * 20.0  # each expert is sure of a quarter of the tokens
    assert float(sequence_load_balance([turns], 1)) == pytest.approx(1.0, abs=1e-5)
    assert float(micro_batch_load_balance([turns, turns], 1)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_sending_everything_to_the_same_experts_costs_most(k: int) -> None:
    E = 8
    row = torch.zeros(E)
    row[:k] = 30.0
    collapsed = row.expand(2, 5, E)
    assert sequence_load_balance([collapsed], k).tolist() == pytest.approx([E / k] * 2)
    assert (sequence_load_balance(logits_of(1, 2, 5, E), k) < E / k).all()


@settings(deadline=None, max_examples=25)
@given(b=st.integers(1, 4), layers=st.integers(1, 3), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_each_sequence_is_judged_by_itself(b: int, layers: int, k: int, seed: int) -> None:
    routers = logits_of(layers, b, 6, 5, seed)
    alone = torch.cat([sequence_load_balance([r[i : i + 1] for r in routers], k) for i in range(b)])
    torch.testing.assert_close(sequence_load_balance(routers, k), alone)
    alone = torch.cat([router_z([r[i : i + 1] for r in routers]) for i in range(b)])
    torch.testing.assert_close(router_z(routers), alone)


@settings(deadline=None, max_examples=25)
@given(real=st.integers(1, 5), seed=st.integers(0, 99))
def test_padding_is_as_if_it_were_not_there(real: int, seed: int) -> None:
    routers = logits_of(2, 1, 6, 5, seed)
    mask = (torch.arange(6) < real)[None]
    short = [r[:, :real] for r in routers]
    torch.testing.assert_close(sequence_load_balance(routers, 2, mask), sequence_load_balance(short, 2))
    torch.testing.assert_close(micro_batch_load_balance(routers, 2, mask), micro_batch_load_balance(short, 2))
    torch.testing.assert_close(router_z(routers, mask), router_z(short))


def test_the_micro_batch_form_is_that_of_transformers() -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    routers = logits_of(3, 2, 7, 6)
    expected = mixtral.load_balancing_loss_func(tuple(r.flatten(0, 1) for r in routers), 6, 2)
    torch.testing.assert_close(micro_batch_load_balance(routers, 2), expected)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    expected = mixtral.load_balancing_loss_func(tuple(r.flatten(0, 1) for r in routers), 6, 2, mask)
    torch.testing.assert_close(micro_batch_load_balance(routers, 2, mask.bool()), expected)


def test_router_z_is_the_mean_squared_logsumexp() -> None:
    routers = logits_of(2, 3, 4, 5)
    expected = torch.stack([torch.logsumexp(r, -1) ** 2 for r in routers]).mean((0, 2))
    torch.testing.assert_close(router_z(routers), expected)


def test_the_gradient_flows_through_probabilities_and_pushes_towards_balance() -> None:
    logits = torch.tensor([[[2.0, 0.0, 0.0], [2.0, 0.1, 0.0]]], requires_grad=True)
    sequence_load_balance([logits], 1).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[..., 0] > 0).all()  # descending lowers the crowded expert's logit
    assert (logits.grad[..., 1:] < 0).all()
