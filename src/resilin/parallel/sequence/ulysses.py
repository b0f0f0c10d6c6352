"""Ulysses: every rank computes some tokens of each row, but in attention some heads of all tokens.

Around each attention core there is an exchange, heads for tokens, and one back (DeepSpeed-Ulysses, Jacobs et al., 2023;
Arctic Long Sequence Training, Bekman et al., 2025, section 3.2). Each rank sends T * (2 H + 2 K) * D * (P - 1) / P
values a row and layer, the same however many ranks share a row that grows with them. The core in between is the
model's own, on whole rows with the masks, documents and windows of whole rows.

Shapes: B batch, H query heads, K key heads, T tokens of one rank, R tokens of a row, D head size.
"""

from __future__ import annotations

from torch import Tensor, nn

from resilin.models import uncompiled
from resilin.models.attention import Attention
from resilin.models.decoder import Decoder
from resilin.models.mask import Mask
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.sequence.exchange import heads_to_rows, rows_to_heads
from resilin.parallel.sequence.heads import share_heads
from resilin.parallel.sequence.part import RankPart


class UlyssesCore(nn.Module):
    """An attention core between two exchanges.

    Attributes:
        inner: the core on whole rows.
        group: the ranks that share each row.
    """

    def __init__(self, inner: nn.Module, group: Group) -> None:
        super().__init__()
        self.inner, self.group = inner, group

    def forward(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Mask) -> Tensor:
        """Mixed values (B, H, T, D) of this rank's tokens; the mask is of whole rows."""
        mixed_BHTD: Tensor = uncompiled.outside(self._mixed, q_BHTD, k_BKTD, v_BKTD, mask)
        return mixed_BHTD

    def _mixed(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Mask) -> Tensor:
        shares = share_heads(q_BHTD.shape[1], k_BKTD.shape[1], self.group.size)
        q_BhRD, k_BkRD, v_BkRD = heads_to_rows(q_BHTD, k_BKTD, v_BKTD, shares, self.group)
        reads = shares.reads(self.group.index)
        if reads is not None:  # a key head for every query head
            k_BkRD, v_BkRD = k_BkRD[:, reads], v_BkRD[:, reads]
        return rows_to_heads(self.inner(q_BhRD, k_BkRD, v_BkRD, mask), shares, self.group)


def undivided(model: nn.Module) -> tuple[Decoder, list[Attention]]:
    """The decoder inside a model, and its attention modules.

    Raises:
        ParallelError: there is no decoder of ours in it, or its rows are divided already.
    """
    decoders = [module for module in model.modules() if isinstance(module, Decoder)]
    if len(decoders) != 1:
        raise ParallelError(
            f"rows are divided over ranks inside a Decoder, but this {type(model).__name__} has {len(decoders)} of them"
        )
    (decoder,) = decoders
    if decoder.indivisible is not None:
        raise ParallelError(f"{decoder.indivisible}: use parallel.context = 1")
    if decoder.sequence is not None:
        raise ParallelError("the rows of this model are divided over ranks already")
    return decoder, [module for module in decoder.modules() if isinstance(module, Attention)]


def ulysses(model: nn.Module, group: Group) -> None:
    """Make a model compute its share of each row: it then takes, and gives, this rank's tokens only.

    Parameters stay whole and the same on all ranks; each rank's gradient is a part, and the sum over the group is the
    gradient. Any number of heads on at most as many ranks; key heads that several ranks need are sent to each of them.
    Batches are divided by `resilin.parallel.sequence.shard.shard_sequence`.

    Args:
        model: a `Decoder`, or a model around one; changed in place. Under tensor parallelism its heads are those of
            this rank.
        group: the ranks that share each row, in order. One rank: nothing is changed.

    Raises:
        ParallelError: the model has no decoder of ours, or fewer heads than there are ranks.
    """
    if group.size == 1:
        return
    decoder, attentions = undivided(model)
    for attention in attentions:
        share_heads(attention.heads, attention.key_heads, group.size)
        attention.core = UlyssesCore(attention.core, group)
    decoder.sequence = RankPart("ulysses", group)
