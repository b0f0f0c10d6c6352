"""A rank's share in rows: stretches of equal length, or one piece from the front and one from the back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from resilin.models.sequence_part import Fields
from resilin.parallel.group import Group
from resilin.parallel.sequence.exchange import gather_rows, total

ContextKind = Literal["ulysses", "ring"]


def pieces_of(kind: ContextKind, rank: int, ranks: int) -> tuple[int, ...]:
    """Which of a row's equal pieces a rank has, in the order in which it holds them.

    `ulysses`: rank r of P has piece r of P. `ring`: pieces r and 2P - 1 - r of 2P, so that under a causal mask all
    ranks have the same work: what piece r lacks in keys, the other has.
    """
    return (rank,) if kind == "ulysses" else (rank, 2 * ranks - 1 - rank)


@dataclass(frozen=True)
class RankPart:
    """The tokens of one rank; a `resilin.models.sequence_part.SequencePart`.

    Attributes:
        kind: how rows are divided.
        group: the ranks that share each row.
    """

    kind: ContextKind
    group: Group

    @property
    def ranks(self) -> int:
        """Among which a row is divided."""
        return self.group.size

    @property
    def in_pieces(self) -> bool:
        """Whether attention cores see pieces of rows."""
        return self.kind == "ring"

    def places(self, tokens: int, device: torch.device) -> Tensor:
        """(T,) int64: where this rank's tokens stand in the row."""
        return self._places_of(self.group.index, tokens, device)

    def _places_of(self, rank: int, tokens: int, device: torch.device) -> Tensor:
        pieces = pieces_of(self.kind, rank, self.ranks)
        size = tokens // len(pieces)
        return torch.cat([torch.arange(piece * size, (piece + 1) * size, device=device) for piece in pieces])

    def whole(self, documents_BT: Tensor | None, positions_BT: Tensor | None, continues_BT: Tensor | None) -> Fields:
        """The same fields of whole rows, (B, R), in the order of the row."""
        given = (documents_BT, positions_BT, continues_BT)
        there = [field for field in given if field is not None]
        if not there:
            return None, None, None
        gathered_NBPT = gather_rows(torch.stack([field.to(torch.int64) for field in there]), self.group)
        N, B, P, T = gathered_NBPT.shape
        place_R = torch.cat([self._places_of(rank, T, gathered_NBPT.device) for rank in range(P)])
        whole_NBR = torch.empty_like(gathered_NBPT).view(N, B, P * T)
        whole_NBR[..., place_R] = gathered_NBPT.reshape(N, B, P * T)
        rows = iter(whole_NBR)
        documents, positions, continues = (None if field is None else next(rows) for field in given)
        return documents, positions, continues

    def total(self, part: Tensor) -> Tensor:
        """The sum of each rank's tensor, without a gradient."""
        return total(part, self.group)
