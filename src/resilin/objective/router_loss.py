"""Losses that keep the router of a mixture of experts balanced and its logits small.

Shapes: B samples, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""Where rows are divided over ranks: the sum of each rank's tensor, without a gradient. Each rank's loss is then the
part of its own tokens, and the ranks' losses add up to that of the whole rows."""


def _itself(part: Tensor) -> Tensor:
    return part


def _chosen(logits_BTE: Tensor, experts_per_token: int) -> Tensor:
    """(B, T, E): 1 where a token goes to an expert."""
    with torch.no_grad():
        index_BTK = logits_BTE.topk(experts_per_token, dim=-1).indices
        return torch.zeros_like(logits_BTE).scatter_(-1, index_BTK, 1.0)


def _visited(experts_per_token: int | Sequence[int], layers: int) -> Sequence[int]:
    return (experts_per_token,) * layers if isinstance(experts_per_token, int) else experts_per_token


def sequence_load_balance(
    router_logits: Sequence[Tensor],
    experts_per_token: int | Sequence[int],
    real_BT: Tensor | None = None,
    total: Total = _itself,
) -> Tensor:
    """Imbalance of each sequence: E * sum over e of f_e * P_e, averaged over layers; 1 when perfectly balanced.

    f_e is the share of the sequence's choices that fell on expert e, P_e its mean probability (Switch transformer,
    Fedus et al., 2022, equations 4-6, within a sequence as in DeepSeek-V3, 2024, equations 17-20). Each sequence
    counts by itself, so any split of a batch into micro-batches gives the same sum.

    Args:
        router_logits: (B, T, E) of each layer.
        experts_per_token: how many experts a token visits; one number, or one for each layer.
        real_BT: False for padding; None: every position is a token.
        total: over the ranks that share each row.

    Returns:
        (B,) float32.
    """
    balance_B = torch.zeros(len(router_logits[0]), device=router_logits[0].device)
    for logits_BTE, visited in zip(router_logits, _visited(experts_per_token, len(router_logits)), strict=True):
        logits_BTE = logits_BTE.float()
        real_BT1 = torch.ones_like(logits_BTE[..., :1]) if real_BT is None else real_BT[..., None].float()
        tokens_B1 = total(real_BT1.sum(1)).clamp(min=1)
        chosen_BE = total((_chosen(logits_BTE, visited) * real_BT1).sum(1))
        share_BE = chosen_BE / (tokens_B1 * visited)
        probability_BE = (logits_BTE.softmax(-1) * real_BT1).sum(1) / tokens_B1
        balance_B = balance_B + logits_BTE.shape[-1] * (share_BE * probability_BE).sum(-1)
    return balance_B / len(router_logits)


def micro_batch_load_balance(
    router_logits: Sequence[Tensor],
    experts_per_token: int | Sequence[int],
    real_BT: Tensor | None = None,
    total: Total = _itself,
) -> Tensor:
    """The same imbalance over all tokens and layers of a micro-batch at once, as `transformers` computes it.

    It equals `experts_per_token` when balanced, and, being a product of averages, depends on which sequences share a
    micro-batch. Layers that differ in their experts are not averaged: each counts by itself.

    Args:
        router_logits: (B, T, E) of each layer.
        experts_per_token: how many experts a token visits; one number, or one for each layer.
        real_BT: False for padding; None: every position is a token.
        total: over the ranks that share each row.

    Returns:
        0-d float32.
    """
    visited = _visited(experts_per_token, len(router_logits))
    kinds = {(logits.shape[-1], count) for logits, count in zip(router_logits, visited, strict=True)}
    if len(kinds) > 1:
        alone = [
            micro_batch_load_balance([one], count, real_BT, total)
            for one, count in zip(router_logits, visited, strict=True)
        ]
        return torch.stack(alone).mean()
    logits_LBTE = torch.stack([logits.float() for logits in router_logits])
    real_BT1 = torch.ones_like(logits_LBTE[0, ..., :1]) if real_BT is None else real_BT[..., None].float()
    tokens = (len(router_logits) * total(real_BT1.sum())).clamp(min=1)
    share_E = total((_chosen(logits_LBTE, visited[0]) * real_BT1).sum((0, 1, 2))) / tokens
    probability_E = (logits_LBTE.softmax(-1) * real_BT1).sum((0, 1, 2)) / tokens
    return logits_LBTE.shape[-1] * (share_E * probability_E).sum()


def router_z(router_logits: Sequence[Tensor], real_BT: Tensor | None = None, total: Total = _itself) -> Tensor:
    """Mean squared logsumexp of the router's logits, of each sequence, averaged over layers.

    Source: ST-MoE, Zoph et al., 2022, equation 5.

    Args:
        router_logits: (B, T, E) of each layer.
        real_BT: False for padding; None: every position is a token.
        total: over the ranks that share each row.

    Returns:
        (B,) float32.
    """
    squared_BT = sum(torch.logsumexp(logits.float(), -1).square() for logits in router_logits)
    assert isinstance(squared_BT, Tensor)
    real = torch.ones_like(squared_BT) if real_BT is None else real_BT.float()
    return (squared_BT * real).sum(1) / total(real.sum(1)).clamp(min=1) / len(router_logits)
