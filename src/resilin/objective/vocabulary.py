"""A rank's part of the vocabulary, for losses that never see all logits of a token in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from resilin.config import UserError


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """Which tokens' logits this rank computes, and how ranks put their numbers together.

    A model whose head is cut has one as its attribute `vocabulary_shard`; its `head_weight` then holds these tokens'
    rows first (and maybe padding behind them).

    Attributes:
        start: the first token.
        size: how many, at least one.
        whole: of all ranks together.
        ranks: how many ranks there are.
        all_max: replaces a tensor by its element-wise maximum over the ranks.
        all_sum: the same with the sum.
    """

    start: int
    size: int
    whole: int
    ranks: int
    all_max: Callable[[Tensor], None]
    all_sum: Callable[[Tensor], None]

    @property
    def widest(self) -> int:
        """At least as many as any rank has: what sizes that all ranks must share are chosen by."""
        return -(-self.whole // self.ranks)

    def rows_of(self, head: Tensor) -> Tensor:
        """The rows of these tokens, without padding."""
        return head if len(head) == self.size else head[: self.size]  # the gradient of a slice is a copy

    def local(self, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Where each label is among this rank's tokens (0 where it is not), and whether it is one of them."""
        index_N = labels_N - self.start
        mine_N = (index_N >= 0) & (index_N < self.size)
        return index_N.where(mine_N, 0), mine_N


def shard_of(model: Any) -> VocabularyShard | None:
    """The part of the vocabulary that a model's head computes; None: all of it."""
    shard: VocabularyShard | None = getattr(model, "vocabulary_shard", None)
    return shard


def vocabulary_of(model: Any) -> int:
    """How many tokens a model knows, all ranks together."""
    shard = shard_of(model)
    return len(model.head_weight) if shard is None else shard.whole


def whole_head(model: Any, what: str) -> Tensor:
    """The output matrix (V, D) for what cannot work on a part of it.

    Args:
        model: with a `head_weight`.
        what: needs it, for the message.

    Raises:
        UserError: the model's vocabulary is divided among ranks.
    """
    shard = shard_of(model)
    if shard is not None:
        raise UserError(
            f"{what} reads the whole output matrix, but the model's {shard.whole} tokens are divided among "
            f"{shard.ranks} ranks: use parallel.tensor = 1"
        )
    head: Tensor = model.head_weight
    return head
