"""Block attention gives what plain attention gives, and so do its gradients, of first and second order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resilin.models.block_attention import BLOCK, LONGEST, block_attention, takes


def _inputs(B: int, H: int, K: int, T: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(B + H + K + T)
    shapes = ((B, T, H, D), (B, T, K, D), (B, T, K, D))
    q, k, v = (torch.randn(s, generator=draw, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes)
    return q, k, v


@pytest.mark.parametrize(
    ("B", "H", "K", "T", "D"),
    [(2, 4, 2, 2 * BLOCK, 16), (1, 4, 4, 2 * BLOCK + 7, 8), (3, 6, 2, BLOCK - 1, 4), (1, 3, 1, 1, 4)],
)
def test_values_and_gradients_are_those_of_attention(B: int, H: int, K: int, T: int, D: int) -> None:
    q, k, v = _inputs(B, H, K, T, D, torch.float64)
    ours = block_attention(q, k, v, 0.3)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(9))
    for mine, other in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(theirs, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_gradient_of_the_gradient() -> None:
    q, k, v = _inputs(1, 2, 1, 5, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: block_attention(*x, 0.5), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: block_attention(*x, 0.5), (q, k, v))


def test_a_query_never_sees_a_later_key() -> None:
    q, k, v = _inputs(1, 2, 2, BLOCK + 9, 4, torch.float32)
    before = block_attention(q, k, v, 1.0)
    with torch.no_grad():
        k[:, :, BLOCK + 3 :] += 7.0
        v[:, :, BLOCK + 3 :] -= 5.0
    after = block_attention(q, k, v, 1.0)
    assert torch.equal(before[:, :, : BLOCK + 3], after[:, :, : BLOCK + 3])
    assert not torch.equal(before[:, :, BLOCK + 3 :], after[:, :, BLOCK + 3 :])


def test_only_training_in_float32_on_short_rows_takes_it() -> None:
    q, k, _ = _inputs(1, 2, 1, BLOCK, 4, torch.float32)
    assert takes(q, k)
    with torch.no_grad():
        assert not takes(q, k)
    assert not takes(q.detach(), k.detach())
    assert not takes(q.double(), k.double())
    long_q, long_k, _ = _inputs(1, 2, 1, LONGEST + 1, 4, torch.float32)
    assert not takes(long_q, long_k)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(q, k)


def test_per_sample_gradients_go_another_way() -> None:
    q, k, v = _inputs(3, 2, 1, BLOCK, 4, torch.float32)

    def loss(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor) -> Tensor:
        assert not takes(q_HTD[None], k_KTD[None])
        return F.scaled_dot_product_attention(q_HTD, k_KTD, v_KTD, is_causal=True, enable_gqa=True).sum()

    torch.func.vmap(torch.func.grad(loss))(q.detach(), k.detach(), v.detach())
