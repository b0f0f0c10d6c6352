"""The vocabulary divided over ranks: which tokens are a rank's own, and whole logits where they are asked for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resilin.models.linear import PackedWeight, product
from resilin.objective.vocabulary import VocabularyShard
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.tensor.collectives import copy_in, put_together


def vocabulary_shard(start: int, size: int, whole: int, group: Group) -> VocabularyShard:
    """A rank's tokens.

    Raises:
        ParallelError: it has none.
    """
    if size < 1:
        raise ParallelError(
            f"a vocabulary of {whole} tokens leaves rank {group.index} of {group.size} without any: use fewer ranks of "
            "tensor parallelism, or pad the vocabulary less"
        )

    def all_max(x: Tensor) -> None:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=group.process_group)

    def all_sum(x: Tensor) -> None:
        dist.all_reduce(x, group=group.process_group)

    return VocabularyShard(start, size, whole, group.size, all_max, all_sum)


class WholeLogits:
    """`model.logits` of a model whose head is divided: every rank gets the logits of the whole vocabulary.

    Losses that need not see them take the chunked way (`resilin.objective.cross_entropy`).
    """

    def __init__(self, model: nn.Module, shard: VocabularyShard, sizes: tuple[int, ...], group: Group) -> None:
        self._model, self._shard, self._sizes, self._group = model, shard, sizes, group

    def __call__(self, hidden: Tensor, head: PackedWeight | None = None) -> Tensor:
        """(..., D) after the final norm -> (..., V) logits, float32 at least, soft-capped where the settings say so."""
        if head is not None:
            raise ParallelError("a packed head cannot be used by a model that is divided among ranks")
        model: Any = self._model
        weight: Tensor = model.head_weight[: self._shard.size]
        local = product(copy_in(hidden, self._group), weight)
        local = local.to(torch.promote_types(local.dtype, torch.float32))
        widest = max(self._sizes)
        parts = put_together(nn.functional.pad(local, (0, widest - local.shape[-1])), -1, self._group)
        pieces = parts.unflatten(-1, (self._group.size, widest)).unbind(-2)
        logits = torch.cat([piece[..., :size] for piece, size in zip(pieces, self._sizes, strict=True)], -1)
        cap: float | None = model.settings.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
