"""Modules that take the place of ordinary ones where a computation on a rank's own weights needs the other ranks.

Shapes: ... any leading dimensions, W the whole width that a norm is over, V vocabulary.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from resilin.models.linear import Embedding, Linear, product
from resilin.models.norm import LayerNorm, RMSNorm, Transplant
from resilin.objective.vocabulary import VocabularyShard
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.tensor.collectives import on_first, sum_both


class PartLinear(Linear):
    """A linear map whose input is cut: its result is a part of a sum, to which one rank alone adds the bias."""

    def __init__(self, like: nn.Linear, group: Group) -> None:
        super().__init__(like.in_features, like.out_features, bias=False, device="meta")
        self.weight, self.bias, self.group = like.weight, like.bias, group

    @property
    def can_be_cut(self) -> bool:
        """Whether nothing else is computed, so that of its part, too, parts can be."""
        return type(self) is PartLinear

    def added(self, bias_O: Tensor) -> Tensor:
        """The bias on one rank, zeros on the others."""
        return on_first(bias_O, self.group)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I of this rank) -> (..., O), a summand."""
        return product(x, self.weight, None if self.bias is None else self.added(self.bias))


class VocabularyEmbedding(Embedding):
    """A table of which this rank has some rows: the result is a part of a sum, zeros for other ranks' tokens."""

    def __init__(self, like: nn.Embedding, shard: VocabularyShard) -> None:
        if like.padding_idx is not None or like.max_norm is not None or like.sparse:
            raise ParallelError("an embedding with padding_idx, max_norm or sparse gradients cannot be cut by rows")
        super().__init__(1, like.embedding_dim, device="meta")
        self.weight, self.shard = like.weight, shard
        self.num_embeddings = len(like.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of the whole vocabulary -> (..., D), a summand."""
        index, mine = self.shard.local(ids)
        return super().forward(index).masked_fill(~mine[..., None], 0)


class _CutNorm(nn.Module):
    """A norm over a width of which this rank has a part, of the kind that a subclass is."""

    divided = True
    """Its call takes, as `used`, how many values of the width there are at all ranks together; None: all of them."""

    def __init__(self, weight: nn.Parameter | None, eps: float, width: int, copies: int, group: Group) -> None:
        super().__init__()
        self.weight, self.eps, self.width, self.copies, self.group = weight, eps, width, copies, group

    def _mean(self, x: Tensor, used: int | None) -> Tensor:
        """The mean over the whole width, or over what of it is used, (..., 1)."""
        return sum_both(x.sum(-1, keepdim=True) / self.copies, self.group) / (used or self.width)

    def _normed(self, x: Tensor, used: int | None, *, centred: bool) -> Tensor:
        wide = x if x.dtype.itemsize >= 4 else x.float()
        if centred:
            wide = wide - self._mean(wide, used)
        return wide * (self._mean(wide.square(), used) + self.eps).rsqrt()

    def _scale(self, weight: Tensor | None) -> Tensor:
        found = self.weight if weight is None else weight
        assert found is not None
        return found


class CutRMSNorm(_CutNorm):
    """`resilin.models.norm.RMSNorm` over a width of which this rank has a part."""

    def forward(self, x: Tensor, weight: Tensor | None = None, used: int | None = None) -> Tensor:
        """(..., part of W) -> the same."""
        return (self._normed(x, used, centred=False) * self._scale(weight)).to(x.dtype)


class CutLayerNorm(_CutNorm):
    """`resilin.models.norm.LayerNorm` over a width of which this rank has a part."""

    def forward(self, x: Tensor, weight: Tensor | None = None, used: int | None = None) -> Tensor:
        """(..., part of W) -> the same."""
        return (self._normed(x, used, centred=True) * self._scale(weight)).to(x.dtype)


class CutTransplant(_CutNorm):
    """`resilin.models.norm.Transplant` over a width of which this rank has a part."""

    def __init__(self, kappa: float, eps: float, width: int, copies: int, group: Group) -> None:
        super().__init__(None, eps, width, copies, group)
        self.kappa = kappa

    def forward(self, x: Tensor, used: int | None = None) -> Tensor:
        """(..., part of W) -> the same."""
        return (math.sqrt(self.kappa) * self._normed(x, used, centred=False)).to(x.dtype)


def cut_norm(norm: nn.Module, name: str, width: int, copies: int, group: Group) -> nn.Module:
    """The norm over a cut width that takes the place of a norm over the whole one.

    Args:
        norm: of `resilin.models.norm`, with this rank's part of the scale.
        name: of it, for the message.
        width: the whole.
        copies: how many ranks have the same part.
        group: of the ranks.

    Raises:
        ParallelError: it is of another kind.
    """
    if type(norm) is RMSNorm:
        return CutRMSNorm(norm.weight, norm.eps, width, copies, group)
    if type(norm) is LayerNorm:
        return CutLayerNorm(norm.weight, norm.eps, width, copies, group)
    if type(norm) is Transplant:
        return CutTransplant(norm.kappa, norm.eps, width, copies, group)
    raise ParallelError(f"{name}: a {type(norm).__name__} cannot be computed over a width that is divided among ranks")
