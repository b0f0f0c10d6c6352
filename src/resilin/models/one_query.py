"""Attention of one new token a row, as two products with the query heads of a key head side by side.

What decoding on CPUs spends most on beside the weights. torch's flash kernel takes every query head by itself and so
reads the keys once for each: with four query heads to a key head it needs half as long again, without grouping about
as long.

Shapes: B batch, H query heads, K key heads, G = H / K, N = B * K, S keys, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 8  # rows below which the calls cost more than they save


def takes(q_BHQD: Tensor, causal: bool) -> bool:
    """Whether this is the quicker way for these: one query in each of several rows, float32 on a CPU, no gradients."""
    return (
        q_BHQD.shape[2] == 1
        and not causal
        and q_BHQD.shape[0] >= _FEW
        and q_BHQD.device.type == "cpu"
        and q_BHQD.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # written in place: vmap could not follow
    )


def one_query(q_BH1D: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, seen_B1S: Tensor | None, scale: float) -> Tensor:
    """`softmax(scale * q.k) v`, (B, H, 1, D).

    Args:
        q_BH1D: queries; head h reads key head h // (H / K).
        k_BKSD: keys; any view of a cache.
        v_BKSD: values.
        seen_B1S: bool, True where a row's query sees the key, (B or 1, 1, S); None: everywhere.
        scale: factor of the products.
    """
    B, H, _, D = q_BH1D.shape
    K, S = k_BKSD.shape[1:3]
    logits_NGS = torch.bmm((q_BH1D * scale).reshape(B * K, H // K, D), k_BKSD.flatten(0, 1).transpose(1, 2))
    if seen_B1S is not None:
        logits_NGS.view(B, H, S).masked_fill_(~seen_B1S, -torch.inf)
    mixed_NGD = torch.bmm(torch.softmax(logits_NGS, -1), v_BKSD.flatten(0, 1))
    return mixed_NGD.view(B, H, 1, D)
