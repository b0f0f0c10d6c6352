"""Attention of some queries to some keys of a row, as a part of their attention to all: a kernel of torch, or tiles.

Shapes: B batch, H query heads, K key heads, Q queries, S keys, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resilin.models.tiled_attention import Stretch, attend, gradients

_aten = torch.ops.aten


def _flash_takes(q_BHQD: Tensor, stretch: Stretch) -> bool:
    """Whether torch's flash kernel computes this: a triangle, or all keys behind the queries, in a format it has."""
    rule = stretch.rule
    plain = rule.documents_BT is None and rule.window is None and stretch.softcap is None
    triangle, full = stretch.queries == stretch.keys, stretch.keys[1] <= stretch.queries[0] + 1
    dtypes = (torch.float32, torch.float64) if q_BHQD.device.type == "cpu" else (torch.bfloat16, torch.float16)
    return plain and (triangle or full) and q_BHQD.dtype in dtypes


def attend_piece(q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, stretch: Stretch) -> tuple[Tensor, Tensor]:
    """Mixed values (B, H, Q, D) over these keys, and the log of each query's sum (B, H, Q).

    As `resilin.models.tiled_attention.attend`, and without a graph.
    """
    if not _flash_takes(q_BHQD, stretch):
        return attend(q_BHQD, k_BKSD, v_BKSD, stretch)
    causal = stretch.queries == stretch.keys
    if q_BHQD.device.type == "cpu":
        mixed, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHQD, k_BKSD, v_BKSD, 0.0, causal, scale=stretch.scale
        )
    else:
        mixed, log_sum, *_ = _aten._scaled_dot_product_flash_attention(
            q_BHQD, k_BKSD, v_BKSD, 0.0, causal, False, scale=stretch.scale
        )
    return mixed, log_sum


def piece_gradients(
    grad_BHQD: Tensor,
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mixed_BHQD: Tensor,
    log_sum_BHQ: Tensor,
    stretch: Stretch,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys contribute to the gradients of queries, keys and values.

    Args:
        grad_BHQD: of the mixed values over all keys.
        q_BHQD: queries.
        k_BKSD: keys.
        v_BKSD: values.
        mixed_BHQD: over all keys.
        log_sum_BHQ: over all keys.
        stretch: which queries and keys these are.
    """
    if not _flash_takes(q_BHQD, stretch):
        dot_BHQ = (grad_BHQD.to(log_sum_BHQ.dtype) * mixed_BHQD).sum(-1)
        return gradients(grad_BHQD, q_BHQD, k_BKSD, v_BKSD, dot_BHQ, log_sum_BHQ, stretch)
    given, causal = (grad_BHQD, q_BHQD, k_BKSD, v_BKSD, mixed_BHQD, log_sum_BHQ), stretch.queries == stretch.keys
    if q_BHQD.device.type == "cpu":
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, causal, scale=stretch.scale)
    else:
        Q, S, none = q_BHQD.shape[2], k_BKSD.shape[2], torch.empty(0, dtype=torch.int64, device=q_BHQD.device)
        found = _aten._scaled_dot_product_flash_attention_backward(
            *given, None, None, Q, S, 0.0, causal, none, none, scale=stretch.scale
        )
    grad_q, grad_k, grad_v = found
    return grad_q, grad_k, grad_v
