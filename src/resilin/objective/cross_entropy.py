"""Cross-entropy of a large vocabulary without the logits: a chunk of tokens at a time, gradients made on the way.

The gradient of the loss with respect to a chunk's logits is known as soon as the chunk's logits are, so the forward
pass already computes the gradients of the hidden states and the head, and throws the chunk away (the idea of Liger
kernels, Hsu et al., 2024, and of "Cut your losses", Wijmans et al., 2024). No logits are stored and none are computed
a second time; the price is that the loss can be differentiated only once. `whole_cross_entropy` is the same function
on whole logits, differentiable any number of times.

Where the vocabulary is divided among ranks (`VocabularyShard`), each has its own columns of a chunk's logits; maximum
and sums over the vocabulary are put together, two messages of a few numbers a token, and the gradient by the hidden
states is summed once for all chunks (Shoeybi et al., 2019, section 3).

Shapes: N tokens, C tokens of a chunk, D hidden size, V vocabulary (of this rank).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resilin.objective.vocabulary import VocabularyShard

# Elements of a chunk's logits. On 2 CPU cores 256 to 1024 rows were fastest for vocabularies of
# 4,096 to 32,768; a GPU wants enough rows to fill it.
_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
_CHUNK_ROWS = (128, 8192)


@dataclass(frozen=True, slots=True)
class CrossEntropyTerms:
    """What is summed over tokens: (1 - s) * nll + s * (mean over v of -log p_v) + z * (log Z)^2.

    Attributes:
        smoothing: s, label smoothing (Szegedy et al., 2016), in [0, 1).
        z_loss: z, which pulls log Z = logsumexp(logits) to zero (PaLM, Chowdhery et al., 2022).
        softcap: c of logits = c * tanh(x / c), or None.
    """

    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None


class TokenSums(NamedTuple):
    """Sums over tokens, each 0-d.

    Attributes:
        loss: of all terms, weighted; the only one with a graph.
        nll: plain -log p of the labels.
        hits: how often the label has the largest logit.
        log_z: of log Z.
        z_loss: of z * (log Z)^2, unweighted.
    """

    loss: Tensor
    nll: Tensor
    hits: Tensor
    log_z: Tensor
    z_loss: Tensor


def chunk_rows(vocabulary: int, device_type: str) -> int:
    """A good number of tokens per chunk for a vocabulary on a kind of device."""
    elements = _CHUNK_ELEMENTS.get(device_type, _CHUNK_ELEMENTS["cuda"])
    low, high = _CHUNK_ROWS
    return min(max(elements // vocabulary, low), high)


def whole_cross_entropy(
    logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor | None, terms: CrossEntropyTerms
) -> TokenSums:
    """The sums from whole logits (already soft-capped), by ordinary differentiable operations.

    Args:
        logits_NV: any float format; reduced in at least float32.
        labels_N: int64 in [0, V).
        weights_N: factor of each token's loss, or None for 1.
        terms: `softcap` is not applied again.
    """
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    log_z_N = torch.logsumexp(logits_NV, -1)
    nll_N = log_z_N - logits_NV.gather(-1, labels_N[:, None])[:, 0]
    loss_N = nll_N
    if terms.smoothing:
        loss_N = (1 - terms.smoothing) * nll_N + terms.smoothing * (log_z_N - logits_NV.mean(-1))
    if terms.z_loss:
        loss_N = loss_N + terms.z_loss * log_z_N.square()
    if weights_N is not None:
        loss_N = loss_N * weights_N
    with torch.no_grad():
        hits = (logits_NV.argmax(-1) == labels_N).sum().double()
        plain, log_z, squared = nll_N.double().sum(), log_z_N.double().sum(), log_z_N.double().square().sum()
    return TokenSums(loss_N.double().sum(), plain, hits, log_z, terms.z_loss * squared)


def chunked_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    terms: CrossEntropyTerms,
    rows: int | None = None,
    shard: VocabularyShard | None = None,
) -> TokenSums:
    """The same sums with logits = softcap(hidden @ head^T), never holding more than a chunk of them.

    Matrix products run in the autocast format where autocast is on (their results are reduced in float32), else in
    the format of `hidden_ND`. The loss can be differentiated once.

    Args:
        hidden_ND: last hidden states.
        head_VD: output matrix; a tied embedding gets its share of gradient through it.
        labels_N: int64 in [0, V).
        weights_N: factor of each token's loss (no gradient flows to it), or None for 1.
        terms: of the loss.
        rows: tokens per chunk; None: chosen by `chunk_rows`.
        shard: the tokens whose rows `head_VD` begins with, where the vocabulary is divided; every rank calls with the
            same hidden states, labels and weights, and gets the same sums and gradient by the hidden states.
    """

    def score(logits_CV: Tensor, part: slice, exact: bool) -> tuple[Tensor, Tensor]:
        weights_C = None if weights_N is None else weights_N[part].to(logits_CV.dtype)
        return chunk_of_logits(logits_CV, labels_N[part], weights_C, terms, exact, shard)

    loss, others = chunked_head_loss(hidden_ND, head_VD, score, sums=5, rows=rows, shard=shard)
    nll, hits, log_z, squared = others.unbind()
    return TokenSums(loss, nll, hits, log_z, terms.z_loss * squared)


Score = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor]]
"""(logits_CV of a chunk in float32 or better, which tokens, whether the products gave all of that precision) ->
(sums over the chunk, float64, the loss first; the loss's gradient by the logits). The logits may be overwritten."""


def chunked_head_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    score: Score,
    *,
    sums: int,
    rows: int | None = None,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor]:
    """A loss that is a sum over tokens of a function of their logits = hidden @ head^T, a chunk of logits at a time.

    Args:
        hidden_ND: last hidden states.
        head_VD: output matrix.
        score: called once for each chunk.
        sums: how many sums `score` gives.
        rows: tokens per chunk; None: chosen by `chunk_rows`.
        shard: the tokens whose rows `head_VD` begins with; the gradient by the hidden states is summed over the ranks.

    Returns:
        The loss, float64 with a graph, differentiable once; and the other sums.
    """
    if shard is not None:
        head_VD = shard.rows_of(head_VD)
    rows = rows or chunk_rows(len(head_VD) if shard is None else shard.widest, head_VD.device.type)
    loss, others = _ChunkedHeadLoss.apply(hidden_ND, head_VD, score, sums, rows, torch.is_grad_enabled(), shard)
    return loss, others


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The format of the head's products: autocast's where it is on, else that of the hidden states."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def chunk_of_logits(
    logits_CV: Tensor,
    labels_C: Tensor,
    weights_C: Tensor | None,
    terms: CrossEntropyTerms,
    exact: bool,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums (loss, nll, hits, log Z, squared log Z) of a chunk; turns its logits into their gradient in place.

    Args:
        logits_CV: before the soft-cap, float32 or float64; overwritten by the gradient.
        labels_C: int64.
        weights_C: or None.
        terms: of the loss.
        exact: whether the products gave float32 or better. Then a label whose logit equals the maximum is a hit
            (on CPUs an argmax takes ten times as long as a maximum); in bfloat16 such ties are common: argmax decides.
        shard: whose tokens' logits these are; the sums are those of the whole vocabulary on every rank.
    """
    slope_CV = None
    if terms.softcap is not None:
        logits_CV.div_(terms.softcap).tanh_()
        slope_CV = 1 - logits_CV.square()
        logits_CV.mul_(terms.softcap)
    index_C, mine_C = (labels_C, None) if shard is None else shard.local(labels_C)
    label_C = logits_CV.gather(-1, index_C[:, None])[:, 0]
    top_C = logits_CV.amax(-1)
    best_C = None if exact else logits_CV.argmax(-1)
    sum_C = logits_CV.sum(-1) if terms.smoothing else None
    if shard is not None:
        best_C = _agree_on_top(top_C, best_C, shard)
    total_C = logits_CV.sub_(top_C[:, None]).exp_().sum(-1)
    if shard is not None and mine_C is not None:
        label_C, total_C, sum_C = _sum_over_vocabulary(label_C.where(mine_C, 0), total_C, sum_C, shard)
    hits_C = label_C >= top_C if best_C is None else best_C == labels_C
    vocabulary = logits_CV.shape[-1] if shard is None else shard.whole
    mean_C = None if sum_C is None else sum_C / vocabulary
    log_z_C = top_C + total_C.log()
    nll_C = log_z_C - label_C
    loss_C, pull_C = nll_C, 1 / total_C
    if mean_C is not None:
        loss_C = (1 - terms.smoothing) * nll_C + terms.smoothing * (log_z_C - mean_C)
    if terms.z_loss:
        loss_C = loss_C + terms.z_loss * log_z_C.square()
        pull_C = pull_C * (1 + 2 * terms.z_loss * log_z_C)
    one_C = weights_C if weights_C is not None else torch.ones_like(pull_C)
    if weights_C is not None:
        loss_C, pull_C = loss_C * weights_C, pull_C * weights_C
    # d loss / d logits = w * ((1 + 2 z log Z) * softmax - (1 - s) * onehot - s / V)
    logits_CV.mul_(pull_C[:, None])
    at_label_C = (terms.smoothing - 1) * one_C
    if mine_C is not None:
        at_label_C = at_label_C.where(mine_C, 0)
    logits_CV.scatter_add_(-1, index_C[:, None], at_label_C[:, None])
    if terms.smoothing:
        logits_CV.sub_(terms.smoothing / vocabulary * one_C[:, None])
    if slope_CV is not None:
        logits_CV.mul_(slope_CV)
    per_token = torch.stack((loss_C, nll_C, hits_C.to(nll_C.dtype), log_z_C, log_z_C.square()))
    return per_token.double().sum(-1), logits_CV


def _agree_on_top(top_C: Tensor, best_C: Tensor | None, shard: VocabularyShard) -> Tensor | None:
    """Makes `top_C` the maximum over the whole vocabulary; gives the first token that has it, where it is asked for."""
    own_C = top_C.clone()
    shard.all_max(top_C)
    if best_C is None:
        return None
    # The least token is the largest negative one; float64 holds every id.
    first_C = -(best_C + shard.start).double().where(own_C == top_C, shard.whole)
    shard.all_max(first_C)
    return (-first_C).long()


def _sum_over_vocabulary(
    label_C: Tensor, total_C: Tensor, sum_C: Tensor | None, shard: VocabularyShard
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of the ranks' numbers, in one message."""
    stacked = torch.stack([label_C, total_C] if sum_C is None else [label_C, total_C, sum_C])
    shard.all_sum(stacked)
    return stacked[0], stacked[1], None if sum_C is None else stacked[2]


class _ChunkedHeadLoss(torch.autograd.Function):
    """(hidden, head, ...) -> (loss, the other sums); the gradients are made in `forward`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        score: Score,
        count: int,
        rows: int,
        differentiate: bool,
        shard: VocabularyShard | None,
    ) -> tuple[Tensor, Tensor]:
        """One pass over the chunks."""
        dtype, (N, D), V = compute_dtype(hidden_ND), hidden_ND.shape, len(head_VD)
        wide = torch.promote_types(dtype, torch.float32)
        for_hidden, for_head = (differentiate and need for need in ctx.needs_input_grad[:2])
        hidden_grad_ND = torch.empty_like(hidden_ND) if for_hidden else None
        head_grad_VD = torch.zeros(V, D, dtype=wide, device=head_VD.device) if for_head else None
        sums = torch.zeros(count, dtype=torch.float64, device=hidden_ND.device)
        pieces = max(1, -(-N // rows))
        rows = -(-N // pieces)  # even chunks: a last chunk of a few rows would cost nearly a whole one
        buffer_CV = torch.empty(rows, V, dtype=wide, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            x_ND, w_VD = hidden_ND.to(dtype), head_VD.to(dtype)
            for start in range(0, N, max(rows, 1)):
                part = slice(start, min(start + rows, N))
                x_CD = x_ND[part]
                logits_CV = buffer_CV[: len(x_CD)]
                if dtype == wide:
                    torch.mm(x_CD, w_VD.t(), out=logits_CV)
                else:
                    logits_CV.copy_(torch.mm(x_CD, w_VD.t()))
                chunk_sums, grad_CV = score(logits_CV, part, dtype == wide)
                sums += chunk_sums
                if for_hidden or for_head:
                    grad_CV = grad_CV.to(dtype)
                if hidden_grad_ND is not None:
                    hidden_grad_ND[part] = torch.mm(grad_CV, w_VD)
                if head_grad_VD is not None and dtype == wide:
                    head_grad_VD.addmm_(grad_CV.t(), x_CD)
                elif head_grad_VD is not None:
                    head_grad_VD.add_(torch.mm(grad_CV.t(), x_CD))
        if hidden_grad_ND is not None and shard is not None:
            shard.all_sum(hidden_grad_ND)
        ctx.grads = (hidden_grad_ND, None if head_grad_VD is None else head_grad_VD.to(head_VD.dtype))
        loss, others = sums[0].clone(), sums[1:].clone()
        ctx.mark_non_differentiable(others)
        return loss, others

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients made in `forward`, times that of the loss."""
        if torch.is_grad_enabled():  # create_graph=True: these gradients have no graph, and would count as constants
            raise RuntimeError(
                "the chunked cross-entropy has no gradient of its gradient: set objective.chunk = 0 for whole logits"
            )
        if ctx.grads is None:
            raise RuntimeError(
                "the chunked cross-entropy was differentiated a second time, but its gradients are given away in the "
                "first backward pass: compute the loss again, or set objective.chunk = 0"
            )
        # In place, and handed over: a copy of the head's gradient would be the largest tensor of the backward pass.
        grads = tuple(None if grad is None else grad.mul_(loss_grad) for grad in ctx.grads)
        ctx.grads = None
        return (*grads, None, None, None, None, None)
