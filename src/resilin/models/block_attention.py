"""Causal attention as matrix products over blocks of queries: what training takes on CPUs.

Each block of queries meets only the keys up to its own end, so half of the products are never made, and the query
heads that share a key head are stacked into one product. The attention weights are kept for the backward pass, which
is therefore worth its memory for short rows only; torch's flash kernel, which keeps nothing, takes over beyond.

Shapes: B batch, H query heads, K key heads, G = H / K, T tokens, D head size, R rows of a block times G, S keys seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resilin.models.recompute import nothing_kept

BLOCK = 64
LONGEST = 512
"""Tokens up to which the kept weights, 2 * B * H * T**2 bytes, are small beside a block's other activations."""


def takes(q_BHTD: Tensor, k_BKTD: Tensor) -> bool:
    """Whether block attention is the quicker way for these: float32 training on a CPU, short rows."""
    return (
        q_BHTD.device.type == "cpu"
        and q_BHTD.dtype == torch.float32
        and BLOCK // 2 < q_BHTD.shape[2] <= LONGEST
        and k_BKTD.shape[2] == q_BHTD.shape[2]
        and torch.is_grad_enabled()
        and (q_BHTD.requires_grad or k_BKTD.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # written in place: vmap could not follow
    )


def _blocks(tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]


def _stacked(x_NGTD: Tensor, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of every head that shares a key head, (N, G * rows, D)."""
    return x_NGTD[:, :, start:stop].reshape(x_NGTD.shape[0], -1, x_NGTD.shape[3])


class _BlockAttention(torch.autograd.Function):
    """(q (N, G, T, D) already scaled, k (N, T, D), v (N, T, D)) -> mixed values (N, G, T, D)."""

    @staticmethod
    def forward(ctx: Any, q_NGTD: Tensor, k_NTD: Tensor, v_NTD: Tensor) -> Tensor:
        N, G, T, D = q_NGTD.shape
        mixed_NGTD = torch.empty_like(q_NGTD)
        hidden = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q_NGTD.device).triu(1)
        kept = []
        for start, stop in _blocks(T):
            rows = stop - start
            logits_NRS = torch.bmm(_stacked(q_NGTD, start, stop), k_NTD[:, :stop].transpose(1, 2))
            logits_NRS.view(N, G, rows, stop)[..., start:].masked_fill_(hidden[:rows, :rows], -torch.inf)
            kept.append(torch.softmax(logits_NRS, -1))
            mixed_NGTD[:, :, start:stop] = torch.bmm(kept[-1], v_NTD[:, :stop]).view(N, G, rows, D)
        ctx.save_for_backward(q_NGTD, k_NTD, v_NTD, *kept)
        return mixed_NGTD

    @staticmethod
    def backward(ctx: Any, grad_NGTD: Tensor) -> tuple[Tensor, ...]:
        q_NGTD, k_NTD, v_NTD, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A gradient of this gradient is wanted: go through operations that have one.
            wanted = (q_NGTD, k_NTD, v_NTD)
            return torch.autograd.grad(_plain(*wanted), wanted, grad_NGTD, create_graph=True)
        N, G, T, D = q_NGTD.shape
        grad_q, grad_k, grad_v = torch.empty_like(q_NGTD), torch.zeros_like(k_NTD), torch.zeros_like(v_NTD)
        for (start, stop), weights_NRS in zip(_blocks(T), kept, strict=True):
            own_NRD = _stacked(grad_NGTD, start, stop)
            grad_v[:, :stop].baddbmm_(weights_NRS.transpose(1, 2), own_NRD)
            pull_NRS = torch.bmm(own_NRD, v_NTD[:, :stop].transpose(1, 2))
            pull_NRS = torch._softmax_backward_data(pull_NRS, weights_NRS, -1, weights_NRS.dtype)
            grad_q[:, :, start:stop] = torch.bmm(pull_NRS, k_NTD[:, :stop]).view(N, G, stop - start, D)
            grad_k[:, :stop].baddbmm_(pull_NRS.transpose(1, 2), _stacked(q_NGTD, start, stop))
        return grad_q, grad_k, grad_v


def _plain(q_NGTD: Tensor, k_NTD: Tensor, v_NTD: Tensor) -> Tensor:
    """The same by operations that can be differentiated any number of times."""
    T = q_NGTD.shape[2]
    hidden = torch.ones(T, T, dtype=torch.bool, device=q_NGTD.device).triu(1)
    logits = (q_NGTD @ k_NTD[:, None].transpose(-1, -2)).masked_fill(hidden, -torch.inf)
    return logits.softmax(-1) @ v_NTD[:, None]


def block_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
    """`softmax(scale * q.k) v` where query t sees keys 0 to t.

    Args:
        q_BHTD: queries; head h reads key head h // (H / K).
        k_BKTD: keys.
        v_BKTD: values.
        scale: factor of the products.

    Returns:
        (B, H, T, D).
    """
    B, H, T, D = q_BHTD.shape
    K = k_BKTD.shape[1]
    q_NGTD = (q_BHTD * scale).reshape(B * K, H // K, T, D)
    k_NTD, v_NTD = k_BKTD.reshape(B * K, T, D), v_BKTD.reshape(B * K, T, D)
    with nothing_kept():
        mixed: Tensor = _BlockAttention.apply(q_NGTD, k_NTD, v_NTD)
    return mixed.view(B, H, T, D)
