"""Ring attention: queries stay, keys and values go round the ranks (Liu et al., 2023).

Each rank attends with its queries to the keys it holds at the moment, and what it finds is merged by the logarithms of
the sums; in the backward pass keys go round again, and their gradients with them. A rank holds one piece from the front
of the row and one from the back, so all ranks have the same work under a causal mask (Llama 3, section 3.3.2;
TorchTitan). No rank ever has a whole row, and any number of heads will do: what Ulysses cannot do. torch's own ring
takes CUDA kernels only, and neither documents nor windows.

Shapes: B batch, H query heads, K key heads, T tokens of one rank, D head size, P ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from resilin.models import uncompiled
from resilin.models.attention_core import AttentionCore
from resilin.models.mask import Mask
from resilin.models.mask_rule import MaskRule
from resilin.models.recompute import nothing_kept
from resilin.models.tiled_attention import Stretch, refuse_second_derivative
from resilin.parallel.activity import waiting
from resilin.parallel.exchange import ask, post
from resilin.parallel.group import Group
from resilin.parallel.sequence.part import RankPart, pieces_of
from resilin.parallel.sequence.piece_attention import attend_piece, piece_gradients
from resilin.parallel.sequence.ulysses import undivided


class _Passing:
    """A tensor on its way to the next rank, and the one that comes from the rank before."""

    def __init__(self, tensor: Tensor, group: Group) -> None:
        before, after = ((group.index + step) % group.size for step in (-1, 1))
        self._sent, self._coming = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self._group, self._from, self._to = group, (group.ranks[before],), (group.ranks[after],)
        self._work = post(self._sent, after, 0, group)
        self._wait = ask(self._coming, before, 0, group)

    def arrived(self) -> Tensor:
        """What the rank before has sent."""
        with waiting(self._from):
            self._wait()
        if self._work is not None:
            with waiting(self._to):
                self._group.wait_message(self._work)
        return self._coming


def _pairs(
    rule: MaskRule, owner: int, group: Group, tokens: int, scale: float, softcap: float | None
) -> Iterator[tuple[slice, slice, Stretch]]:
    """The places, in the two ranks' tensors, of queries and keys of which some are seen; and where these stand."""
    size = tokens // 2
    for at, query in enumerate(pieces_of("ring", group.index, group.size)):
        queries = (query * size, (query + 1) * size)
        first = int(rule.first_keys[slice(*queries)].min())
        for key_at, key in enumerate(pieces_of("ring", owner, group.size)):
            keys = (key * size, (key + 1) * size)
            if key <= query and keys[1] > first:
                here, there = slice(at * size, (at + 1) * size), slice(key_at * size, (key_at + 1) * size)
                yield here, there, Stretch(rule, queries, keys, scale, softcap)


def _merge(mixed: Tensor, log_sum: Tensor, more: Tensor, more_log_sum: Tensor) -> None:
    """Put what further keys give to what is there, in place; -inf is a sum over nothing."""
    both = torch.logaddexp(log_sum, more_log_sum)
    base = both.masked_fill(both == -torch.inf, 0.0)
    mixed.mul_((log_sum - base).exp_()[..., None]).add_(more * (more_log_sum - base).exp_()[..., None])
    log_sum.copy_(both)


class _RingAttention(torch.autograd.Function):
    """(q, k, v of this rank's tokens, rule, group, scale, softcap) -> mixed values of this rank's tokens."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: MaskRule, group: Group, scale: float, softcap: float | None
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        mixed = torch.zeros_like(q, dtype=wide, memory_format=torch.contiguous_format)
        log_sum = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
        keys_values, tokens = torch.stack((k, v)), q.shape[2]
        for step in range(group.size):
            passing = _Passing(keys_values, group) if step < group.size - 1 else None
            owner = (group.index - step) % group.size
            for here, there, stretch in _pairs(rule, owner, group, tokens, scale, softcap):
                own = q[:, :, here], keys_values[0, :, :, there], keys_values[1, :, :, there]
                with nothing_kept():
                    piece = attend_piece(*own, stretch)
                _merge(mixed[:, :, here], log_sum[:, :, here], *piece)
            if passing is not None:
                keys_values = passing.arrived()
        mixed = mixed.to(q.dtype)
        ctx.save_for_backward(q, k, v, mixed, log_sum)
        ctx.rest = rule, group, scale, softcap
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        q, k, v, mixed, log_sum = ctx.saved_tensors
        rule, group, scale, softcap = ctx.rest
        grad_q = torch.zeros_like(q, dtype=log_sum.dtype, memory_format=torch.contiguous_format)
        keys_values, tokens, grad = torch.stack((k, v)), q.shape[2], grad.contiguous()
        grad_passing: _Passing | None = None
        for step in range(group.size):
            passing = _Passing(keys_values, group) if step < group.size - 1 else None
            owner = (group.index - step) % group.size
            grad_keys_values = torch.zeros_like(keys_values, dtype=log_sum.dtype)
            for here, there, stretch in _pairs(rule, owner, group, tokens, scale, softcap):
                own = q[:, :, here], keys_values[0, :, :, there], keys_values[1, :, :, there]
                found = piece_gradients(
                    grad[:, :, here], *own, mixed[:, :, here].contiguous(), log_sum[:, :, here].contiguous(), stretch
                )
                grad_q[:, :, here] += found[0]
                grad_keys_values[0, :, :, there] += found[1]
                grad_keys_values[1, :, :, there] += found[2]
            if grad_passing is not None:  # the sum so far comes from the rank that had these keys before
                grad_keys_values += grad_passing.arrived()
            grad_passing = _Passing(grad_keys_values, group)
            if passing is not None:
                keys_values = passing.arrived()
        assert grad_passing is not None
        grad_k, grad_v = grad_passing.arrived().to(k.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, None


class RingCore(nn.Module):
    """An attention core whose keys go round a ring.

    Attributes:
        inner: the core it stands for, whose scale and soft-cap it takes.
        group: the ranks that share each row.
    """

    def __init__(self, inner: AttentionCore, group: Group) -> None:
        super().__init__()
        self.inner, self.group = inner, group

    def forward(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Mask) -> Tensor:
        """Mixed values (B, H, T, D) of this rank's tokens; the mask is a rule of whole rows.

        Raises:
            ValueError: this rank's tokens are not two equal pieces.
        """
        mixed_BHTD: Tensor = uncompiled.outside(self._mixed, q_BHTD, k_BKTD, v_BKTD, mask)
        return mixed_BHTD

    def _mixed(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Mask) -> Tensor:
        assert mask.rule is not None
        if q_BHTD.shape[2] % 2:
            raise ValueError(
                f"a rank of a ring has two equal pieces of each row, but {q_BHTD.shape[2]} tokens came: divide batches "
                "by shard_sequence(batch, group, 'ring')"
            )
        mixed: Tensor = _RingAttention.apply(
            q_BHTD, k_BKTD, v_BKTD, mask.rule, self.group, self.inner.scale, self.inner.softcap
        )
        return mixed


def ring(model: nn.Module, group: Group) -> None:
    """Make a model compute its share of each row: it then takes, and gives, this rank's two pieces only.

    As `resilin.parallel.sequence.ulysses.ulysses`, for any number of heads. Batches are divided by
    `shard_sequence(batch, group, "ring")`.

    Args:
        model: a `Decoder`, or a model around one; changed in place.
        group: the ranks that share each row, in order. One rank: nothing is changed.

    Raises:
        ParallelError: the model has no decoder of ours.
    """
    if group.size == 1:
        return
    decoder, attentions = undivided(model)
    for attention in attentions:
        assert isinstance(attention.core, AttentionCore)
        attention.core = RingCore(attention.core, group)
    decoder.sequence = RankPart("ring", group)
