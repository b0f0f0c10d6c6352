"""Whose experts speak: each one's share of the routing weight, by layer.

Shapes: B batch, T tokens, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from resilin.inference.scoring import evaluating
from resilin.joined.errors import JoinError
from resilin.models.decoder import Decoder
from resilin.models.moe import route
from resilin.nested.budgets import Budget
from resilin.nested.in_place import budget
from resilin.nested.sub_model import sub_model
from resilin.nouns import Batch
from resilin.objective.next_token import valid_labels


def attribution(model: Decoder, batches: Iterable[Batch], wanted: Budget | None = None) -> Tensor:
    """(L, E): the mean share of each expert in the weights of a token's choices; rows sum to 1.

    Args:
        model: with experts in every layer.
        batches: of the text.
        wanted: run so much of the model; experts that are left out have a share of 0. None: all.

    Raises:
        JoinError: the model has no experts, or the text no tokens.
    """
    settings = model.settings
    if settings.moe is None:
        raise JoinError("the model has no experts: there is nothing to attribute")
    wanted = wanted or Budget()
    parts = sub_model(settings, wanted).layers
    total_LE = torch.zeros(settings.layers, settings.moe.experts, dtype=torch.float64)
    tokens = 0
    with evaluating(model), budget(model, wanted):
        for batch in batches:
            valid_BT = valid_labels(batch)
            output = model(batch["tokens"], batch.get("positions"), batch.get("documents"))
            tokens += int(valid_BT.sum())
            for part, logits_BTE in zip(parts, output.router_logits, strict=True):
                weights_Nk, chosen_Nk = route(logits_BTE[valid_BT], settings.moe, part.top_k)
                weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True)
                shares_E = torch.zeros(logits_BTE.shape[-1], dtype=torch.float64)
                shares_E.index_add_(0, chosen_Nk.flatten().cpu(), weights_Nk.flatten().double().cpu())
                total_LE[part.layer, list(part.experts)] += shares_E
    if not tokens:
        raise JoinError("the text has no tokens to attribute")
    return total_LE / tokens
