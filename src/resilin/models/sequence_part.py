"""Which tokens of its rows a decoder computes, where the rows are divided over ranks.

Everything in a decoder but attention takes each token by itself. What it has to be told of the others is here, and
the attention cores are exchanged for ones that talk to the other ranks; see `resilin.parallel.sequence`.

Shapes: B batch, T tokens of this rank, R tokens of a whole row.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Fields = tuple[Tensor | None, Tensor | None, Tensor | None]


class SequencePart(Protocol):
    """The share of one rank in each row."""

    @property
    def ranks(self) -> int:
        """Among which a row is divided, equally many tokens each."""

    @property
    def in_pieces(self) -> bool:
        """Whether attention cores see pieces of rows, and take masks as rules; else they see whole rows."""

    def places(self, tokens: int, device: torch.device) -> Tensor:
        """(T,) int64: where this rank's tokens stand in the row."""

    def whole(self, documents_BT: Tensor | None, positions_BT: Tensor | None, continues_BT: Tensor | None) -> Fields:
        """The same fields of whole rows, (B, R), in the order of the row; one exchange, None where None is given."""

    def total(self, part: Tensor) -> Tensor:
        """The sum of each rank's tensor, without a gradient."""
