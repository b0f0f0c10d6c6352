"""Counting which experts a model chooses while it reads: the counts that `resilin.nested.expert_use` is about.

Shapes: B batch, T tokens, N real tokens, E experts, k choices of a token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resilin.inference.scoring import evaluating
from resilin.models.moe import MoE, route
from resilin.nested.budgets import Budget, BudgetError
from resilin.nested.in_place import budget, decoder_in
from resilin.nested.sub_model import sub_model
from resilin.nouns import Batch


def expert_loads(model: nn.Module, batches: Iterable[Batch], wanted: Budget | None = None) -> list[Tensor | None]:
    """How many choices of real tokens fell on each expert, (E,) int64 on the CPU for each layer of the model.

    None for layers without experts; zeros for layers and experts that a budget leaves out.

    Args:
        model: with a decoder that has experts.
        batches: with `tokens` and, where they are packed or padded, `positions` and `documents`.
        wanted: run so much of it; None: all.

    Raises:
        BudgetError: the model has no experts, or the budget does not fit.
    """
    decoder, wanted = decoder_in(model), wanted or Budget()
    settings = decoder.settings
    if settings.moe is None:
        raise BudgetError("the model has no experts: there are no loads to count")
    parts = [one for one in sub_model(settings, wanted).layers if one.experts]
    counts: list[Tensor | None] = []
    for layer in range(settings.layers):
        moe = settings.at(layer).moe if settings.is_moe_layer(layer) else None
        counts.append(None if moe is None else torch.zeros(moe.experts, dtype=torch.int64))
    device = decoder.embed.weight.device
    with evaluating(decoder), budget(decoder, wanted):
        for batch in batches:
            batch = batch.to(device)
            documents_BT = batch.get("documents")
            tokens_BT = batch["tokens"]
            real_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if documents_BT is None else documents_BT >= 0
            output = decoder(tokens_BT, batch.get("positions"), documents_BT)
            for place, logits_BTE in enumerate(output.router_logits):
                part = parts[place % len(parts)]  # a looped decoder passes its layers again
                mixture = decoder.blocks[part.layer].moe
                assert isinstance(mixture, MoE)
                chosen_Nk = _chosen(mixture, logits_BTE[real_BT], part.experts, part.top_k)
                counts_E = counts[part.layer]
                assert counts_E is not None
                counts_E += torch.bincount(chosen_Nk.flatten().cpu(), minlength=len(counts_E))
    return counts


def _chosen(mixture: MoE, logits_NE: Tensor, experts: tuple[int, ...], top_k: int) -> Tensor:
    """(N, k) numbers of experts."""
    numbers_E = torch.tensor(experts, device=logits_NE.device)
    offsets_E = mixture.balance_bias[numbers_E] if mixture.settings.balance == "bias" else None
    _, chosen_Nk = route(logits_NE, mixture.settings, top_k, offsets_E)
    return numbers_E[chosen_Nk]


def stacked(counts: Iterable[Tensor | None]) -> Tensor:
    """(L, E): of the layers that have experts.

    Raises:
        BudgetError: they have different numbers of them.
    """
    found = [one for one in counts if one is not None]
    if len({len(one) for one in found}) != 1:
        raise BudgetError("layers have different numbers of experts: look at each by itself")
    return torch.stack(found)
