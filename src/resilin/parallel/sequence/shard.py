"""The share of one rank in a batch's rows.

Shapes: B rows, T tokens of a row, P ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resilin.nouns import Batch
from resilin.objective.next_token import IGNORE
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.sequence.part import ContextKind, RankPart, pieces_of

_PADDING: dict[str, int] = {"labels": IGNORE, "documents": -1, "continues": -1}


def shard_sequence(batch: Batch, group: Group, kind: ContextKind = "ulysses") -> Batch:
    """This rank's tokens of every row of a batch that all ranks of the group have fetched.

    Sources shift labels before (`labels[b, t]` is what follows `tokens[b, t]`), so no target is lost between ranks.
    Positions are made here where the source gives none: made after, they would begin anew on every rank. Rows that do
    not divide are padded at the end: labels -100, weights 0, positions going on, documents -1 (made where there are
    none, so that routers do not count padding).

    Args:
        batch: whole rows. Fields of shape (B, T, ...), T being that of `tokens`, are divided; others are kept.
        group: the ranks that share each row, in order.
        kind: `ulysses`: rank r has the r-th of P stretches. `ring`: pieces r and 2P - 1 - r of 2P.

    Returns:
        The batch with (B, T / P) fields; the same batch where the group is one rank.
    """
    if group.size == 1:
        return batch
    T = batch["tokens"].shape[1]
    pieces = pieces_of(kind, group.index, group.size)
    parts = group.size * len(pieces)
    padded = -(-T // parts) * parts
    fields = dict(batch.fields)
    if "positions" not in fields:
        fields["positions"] = torch.arange(T, device=fields["tokens"].device).expand(len(batch), T)
    if padded > T and "documents" not in fields:
        fields["documents"] = torch.zeros_like(fields["tokens"], dtype=torch.int32)
    place = RankPart(kind, group).places(padded // group.size, fields["tokens"].device)
    divided = {
        name: _padded(name, field, padded)[:, place.to(field.device)]
        for name, field in fields.items()
        if field.dim() >= 2 and field.shape[1] == T
    }
    return Batch(batch.slots_B, {**fields, **divided})


def refuse_whole_rows(objective: object) -> None:
    """Refuse an objective whose loss some tokens of a row do not tell: it would be wrong without a word.

    Args:
        objective: of the run; one that is a sum over tokens says so by a true attribute `by_token`.

    Raises:
        ParallelError: naming it.
    """
    if not getattr(objective, "by_token", False):
        raise ParallelError(
            f"parallel.context divides rows over workers, and {type(objective).__name__} looks at whole rows (it has "
            "no true attribute `by_token`): use resilin.objective.next_token:NextToken, or parallel.context = 1"
        )


def _padded(name: str, field: Tensor, tokens: int) -> Tensor:
    more = tokens - field.shape[1]
    if more == 0:
        return field
    if name == "positions":
        further = torch.arange(1, more + 1, dtype=field.dtype, device=field.device)
        return torch.cat((field, field[:, -1:] + further), dim=1)
    value = _PADDING.get(name, 0)
    return F.pad(field, (0, 0) * (field.dim() - 2) + (0, more), value=value)
