"""Losses that are functions of the labels' log-probabilities, without the logits of all tokens at once.

A preference loss needs the log-probabilities of a whole pair before it knows any token's gradient, a policy loss only
the token's own. Both fit one scheme: tokens come in groups; as soon as a group's log-probabilities are there, the
caller's function says what they cost, its derivative is taken by autograd over one number a token, and the chunk's
logits are turned into their gradient in place and thrown away. That is three products with the head a token (forward,
and two for the gradients), the least there can be. Only a group larger than a chunk is computed twice.

The gradient is made in the forward pass, so the loss can be differentiated once.

Shapes: N tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resilin.config import UserError
from resilin.objective.cross_entropy import chunk_rows
from resilin.objective.vocabulary import VocabularyShard


class Part(NamedTuple):
    """What a call of a `Score` is about.

    Attributes:
        tokens: which of the N tokens.
        groups: which groups; always whole ones.
    """

    tokens: slice
    groups: slice


Score = Callable[[Tensor, Part], Tensor]
"""(log-probabilities of the part's tokens, the part) -> their loss, 0-d; differentiated by autograd."""


class Head(NamedTuple):
    """What turns hidden states into the distribution that tokens were drawn from.

    Attributes:
        weight_VD: output matrix.
        softcap: c of logits = c * tanh(x / c), or None.
        temperature: divides the logits.
        shard: the tokens that the rows of `weight_VD` are for, where the vocabulary is divided among ranks; all of
            them then compute the same losses of the same hidden states.
    """

    weight_VD: Tensor
    softcap: float | None = None
    temperature: float = 1.0
    shard: VocabularyShard | None = None

    @property
    def rows(self) -> int:
        """A good number of tokens per chunk, the same on all ranks."""
        widest = len(self.weight_VD) if self.shard is None else self.shard.widest
        return chunk_rows(widest, self.weight_VD.device.type)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V), float32 at least.

        Raises:
            UserError: the vocabulary is divided among ranks.
        """
        if self.shard is not None:
            raise UserError(
                f"whole logits (objective.chunk = 0) of a vocabulary divided among {self.shard.ranks} ranks: leave "
                "objective.chunk out"
            )
        x_NV = hidden_ND @ self.weight_VD.to(hidden_ND.dtype).t()
        return self.shaped(x_NV.to(torch.promote_types(x_NV.dtype, torch.float32)))

    def shaped(self, x_NV: Tensor) -> Tensor:
        """Products with the weight -> logits, soft-capped and divided by the temperature."""
        if self.softcap is not None:
            x_NV = self.softcap * torch.tanh(x_NV / self.softcap)
        return x_NV if self.temperature == 1.0 else x_NV / self.temperature


def label_logprobs(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Log p of each label, by ordinary differentiable operations, in float32 at least."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return logits_NV.gather(-1, labels_N[:, None])[:, 0] - torch.logsumexp(logits_NV, -1)


def whole_logprob_loss(logits_NV: Tensor, labels_N: Tensor, groups: Sequence[int], score: Score) -> Tensor:
    """The loss of all tokens from whole logits; differentiable any number of times."""
    return score(label_logprobs(logits_NV, labels_N), Part(slice(0, len(labels_N)), slice(0, len(groups))))


def plan(groups: Sequence[int], rows: int) -> Iterator[Part]:
    """Consecutive groups in parts of at most `rows` tokens; a larger group is a part of its own."""
    first, start, end = 0, 0, 0
    for index, stop in enumerate(accumulate(groups)):
        if stop - start > rows and end > start:
            yield Part(slice(start, end), slice(first, index))
            first, start = index, end
        end = stop
    if groups:
        yield Part(slice(start, end), slice(first, len(groups)))


def chunked_logprob_loss(
    hidden_ND: Tensor, head: Head, labels_N: Tensor, groups: Sequence[int], score: Score, rows: int | None = None
) -> Tensor:
    """The loss of all tokens, its gradients made chunk by chunk.

    Args:
        hidden_ND: last hidden states.
        head: of the model.
        labels_N: int64 in [0, V).
        groups: how many consecutive tokens each group has; they sum to N.
        score: called once for every part, in order, with whole groups.
        rows: tokens whose logits exist at once; None: chosen by vocabulary and device.

    Returns:
        0-d, in the dtype `score` gives.
    """
    if sum(groups) != len(labels_N):
        raise ValueError(f"the groups hold {sum(groups)} tokens, but {len(labels_N)} labels were given")
    rows = rows or head.rows
    parts = tuple(plan(groups, rows))
    loss: Tensor = _ChunkedLogprobLoss.apply(
        hidden_ND, head.weight_VD, head, labels_N, parts, score, rows, torch.is_grad_enabled()
    )
    return loss


def chunked_label_logprobs(hidden_ND: Tensor, head: Head, labels_N: Tensor, rows: int | None = None) -> Tensor:
    """Log p of each label, float32 at least, without gradients and without all logits at once."""
    work = _Work(hidden_ND, head, labels_N, rows or head.rows)
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        pieces = [work.logprobs(piece)[0] for piece in work.pieces(slice(0, len(labels_N)))]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=work.wide, device=hidden_ND.device)


class _Work:
    """The products of hidden states and head, a chunk at a time, in one buffer.

    Products run in the autocast format where autocast is on, else in that of the hidden states; they are reduced in
    float32 at least.
    """

    def __init__(self, hidden_ND: Tensor, head: Head, labels_N: Tensor, rows: int) -> None:
        kind = hidden_ND.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.head, self.rows, self.labels_N = head, rows, labels_N
        self.x_ND = hidden_ND.detach().to(self.dtype)
        self.w_VD = head.weight_VD.detach().to(self.dtype)
        size = min(rows, len(labels_N))
        self.buffer_CV = torch.empty(size, len(self.w_VD), dtype=self.wide, device=hidden_ND.device)

    def pieces(self, tokens: slice) -> list[slice]:
        """A part's tokens in even chunks that fit the buffer."""
        size = tokens.stop - tokens.start
        count = max(1, -(-size // self.rows))
        step = max(1, -(-size // count))
        return [slice(at, min(at + step, tokens.stop)) for at in range(tokens.start, tokens.stop, step)]

    def logprobs(self, piece: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log p of the labels of a chunk, the softmax's denominator and the soft-cap's slope.

        The buffer then holds the softmax's numerators.
        """
        x_CD, labels_C = self.x_ND[piece], self.labels_N[piece]
        logits_CV = self.buffer_CV[: len(x_CD)]
        if self.dtype == self.wide:
            torch.mm(x_CD, self.w_VD.t(), out=logits_CV)
        else:
            logits_CV.copy_(torch.mm(x_CD, self.w_VD.t()))
        slope_CV, cap = None, self.head.softcap
        if cap is not None:
            logits_CV.div_(cap).tanh_()
            slope_CV = 1 - logits_CV.square()
            logits_CV.mul_(cap)
        if self.head.temperature != 1.0:
            logits_CV.div_(self.head.temperature)
        index_C, mine_C = self._own(labels_C)
        label_C = logits_CV.gather(-1, index_C[:, None])[:, 0]
        top_C = logits_CV.amax(-1)
        if self.head.shard is not None:
            self.head.shard.all_max(top_C)
        total_C = logits_CV.sub_(top_C[:, None]).exp_().sum(-1)
        if self.head.shard is not None and mine_C is not None:
            both_2C = torch.stack([label_C.where(mine_C, 0), total_C])
            self.head.shard.all_sum(both_2C)
            label_C, total_C = both_2C.unbind()
        return label_C - top_C - total_C.log(), total_C, slope_CV

    def _own(self, labels_C: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where labels are among the rows of this head, and which are."""
        return (labels_C, None) if self.head.shard is None else self.head.shard.local(labels_C)

    def gradient(self, piece: slice, pull_C: Tensor, total_C: Tensor | None, slope_CV: Tensor | None) -> Tensor:
        """The gradient of the products, given that of the log-probabilities: pull * (onehot - softmax)."""
        assert total_C is not None
        grad_CV = self.buffer_CV[: len(pull_C)]
        pull_C = pull_C.to(self.wide) / self.head.temperature
        grad_CV.mul_((-pull_C / total_C)[:, None])
        index_C, mine_C = self._own(self.labels_N[piece])
        at_label_C = pull_C if mine_C is None else pull_C.where(mine_C, 0)
        grad_CV.scatter_add_(-1, index_C[:, None], at_label_C[:, None])
        if slope_CV is not None:
            grad_CV.mul_(slope_CV)
        return grad_CV.to(self.dtype)


def _cost(score: Score, logprobs: Tensor, part: Part, differentiate: bool) -> tuple[Tensor, Tensor | None]:
    """What a part costs, and the derivative by its log-probabilities."""
    if not differentiate:
        return score(logprobs, part).detach(), None
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        loss = score(leaf, part)
        if not loss.requires_grad:  # a part whose loss is a constant
            return loss.detach(), torch.zeros_like(leaf)
        (pull,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), pull


class _ChunkedLogprobLoss(torch.autograd.Function):
    """(hidden, head, ...) -> loss; the gradients are made in `forward`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        head: Head,
        labels_N: Tensor,
        parts: tuple[Part, ...],
        score: Score,
        rows: int,
        differentiate: bool,
    ) -> Tensor:
        """One pass over the chunks; a second one over those of a group that is larger than a chunk."""
        for_hidden, for_head = (differentiate and need for need in ctx.needs_input_grad[:2])
        work = _Work(hidden_ND, head, labels_N, rows)
        hidden_grad_ND = torch.empty_like(hidden_ND) if for_hidden else None
        head_grad_VD = None
        if for_head:
            head_grad_VD = torch.zeros(weight_VD.shape, dtype=work.wide, device=weight_VD.device)

        def give(piece: slice, grad_CV: Tensor) -> None:
            if hidden_grad_ND is not None:
                hidden_grad_ND[piece] = torch.mm(grad_CV, work.w_VD)
            if head_grad_VD is not None and work.dtype == work.wide:
                head_grad_VD.addmm_(grad_CV.t(), work.x_ND[piece])
            elif head_grad_VD is not None:
                head_grad_VD.add_(torch.mm(grad_CV.t(), work.x_ND[piece]))

        total: Tensor | None = None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for part in parts:
                pieces = work.pieces(part.tokens)
                found = [work.logprobs(piece) for piece in pieces[:1]]
                # Of several chunks only the log-probabilities are kept: the buffer holds one chunk.
                found += [(work.logprobs(piece)[0], None, None) for piece in pieces[1:]]
                logprobs = torch.cat([f[0] for f in found]) if found else hidden_ND.new_empty(0, dtype=work.wide)
                loss, pull = _cost(score, logprobs, part, for_hidden or for_head)
                total = loss if total is None else total + loss
                for piece, kept in zip(pieces, found, strict=True) if pull is not None else ():
                    if len(pieces) > 1:  # the buffer was used again since: this chunk's logits once more
                        kept = work.logprobs(piece)
                    here = slice(piece.start - part.tokens.start, piece.stop - part.tokens.start)
                    assert pull is not None
                    give(piece, work.gradient(piece, pull[here], kept[1], kept[2]))
        if hidden_grad_ND is not None and head.shard is not None:
            head.shard.all_sum(hidden_grad_ND)
        ctx.grads = (hidden_grad_ND, None if head_grad_VD is None else head_grad_VD.to(weight_VD.dtype))
        return total if total is not None else hidden_ND.new_zeros((), dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients made in `forward`, times that of the loss."""
        if torch.is_grad_enabled():
            raise RuntimeError("a chunked loss has no gradient of its gradient: set objective.chunk = 0")
        if ctx.grads is None:
            raise RuntimeError(
                "a chunked loss can be differentiated once: compute it again, or set objective.chunk = 0"
            )
        grads = tuple(None if grad is None else grad.mul_(loss_grad.to(grad.dtype)) for grad in ctx.grads)
        ctx.grads = None
        return (*grads, None, None, None, None, None, None)
