"""The vocabulary divided over ranks: which tokens are a rank's own, and whole logits where they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from resilin.models.linear import PackedWeight
from resilin.objective.vocabulary import VocabularyShard
from resilin.parallel.errors import ParallelError
from resilin.parallel.exchange import add_up, largest
from resilin.parallel.group import Group
from resilin.parallel.tensor.collectives import copy_in, put_together


def vocabulary_shard(start: int, size: int, whole: int, group: Group) -> VocabularyShard:
    """A rank's tokens, and messages among the group."""

    def all_max(x: Tensor) -> None:
        largest(x, group)

    def all_sum(x: Tensor) -> None:
        add_up(x, group)

    return VocabularyShard(start, size, whole, group.size, all_max, all_sum)


class WholeLogits:
    """`model.logits` of a model whose head is divided: every rank gets the logits of the whole vocabulary.

    Losses that need not see them take the chunked way (`resilin.objective.cross_entropy`).
    """

    def __init__(
        self, logits: Callable[[Tensor], Tensor], shard: VocabularyShard, sizes: tuple[int, ...], group: Group
    ) -> None:
        """Args:
        logits: the model's own, which gives those of the rows it has; what it does to them it does one by one.
        shard: this rank's tokens.
        sizes: how many tokens each rank has.
        group: the ranks.
        """
        self._logits, self._shard, self._sizes, self._group = logits, shard, sizes, group

    def __call__(self, hidden: Tensor, head: PackedWeight | None = None) -> Tensor:
        """(..., D) after the final norm -> (..., V) logits."""
        if head is not None:
            raise ParallelError("a packed head cannot be used by a model that is divided among ranks")
        own = self._logits(copy_in(hidden, self._group))[..., : self._shard.size]
        widest = max(self._sizes)
        parts = put_together(F.pad(own, (0, widest - own.shape[-1])), -1, self._group)
        if min(self._sizes) == widest:
            return parts
        pieces = parts.split(widest, -1)
        return torch.cat([piece[..., :size] for piece, size in zip(pieces, self._sizes, strict=True)], -1)
