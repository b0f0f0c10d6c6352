"""Cross-entropy and the divergence from a teacher's distribution in one pass over the head, a chunk at a time.

Neither the student's nor the teacher's logits exist for more than a chunk of tokens; gradients are made on the way, as
in `resilin.objective.cross_entropy`. The loss of a token is

    ce * CE + kl * T^2 * D,    D = KL(p || q) of the teacher's p and the student's q at temperature T (or KL(q || p));

T^2 keeps the size of the gradient when T changes (Hinton et al., "Distilling the knowledge in a neural network", 2015).

Shapes: N tokens, C tokens of a chunk, D hidden size, V vocabulary, K of its entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from resilin.objective.cross_entropy import (
    CrossEntropyTerms,
    TokenSums,
    chunk_of_logits,
    chunk_rows,
    chunked_head_loss,
    compute_dtype,
    whole_cross_entropy,
)

Direction = Literal["forward", "reverse"]


@dataclass(frozen=True, slots=True)
class DistillationTerms:
    """What is summed over tokens.

    Attributes:
        ce: weight of the cross-entropy with the labels.
        kl: weight of T^2 * D.
        temperature: T, dividing both models' logits inside D.
        direction: forward: KL(teacher || student); reverse: KL(student || teacher).
    """

    ce: float = 0.33
    kl: float = 0.67
    temperature: float = 2.0
    direction: Direction = "forward"


class TeacherStates(NamedTuple):
    """A teacher whose logits are made chunk by chunk.

    Attributes:
        hidden_ND: its last hidden states, of the same tokens.
        head_VD: its output matrix.
        softcap: of its logits, or None.
    """

    hidden_ND: Tensor
    head_VD: Tensor
    softcap: float | None = None

    def logits(self, part: slice, dtype: torch.dtype) -> Tensor:
        """(C, V) of some tokens, float32 or better; the product is taken in `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        logits_CV = (self.hidden_ND[part].to(dtype) @ self.head_VD.to(dtype).t()).to(wide)
        return logits_CV if self.softcap is None else logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)


class TeacherLogits(NamedTuple):
    """A teacher that gives whole logits.

    Attributes:
        logits_NV: already soft-capped.
    """

    logits_NV: Tensor

    def logits(self, part: slice, dtype: torch.dtype) -> Tensor:
        """(C, V) of some tokens, float32 or better."""
        return self.logits_NV[part].to(torch.promote_types(dtype, torch.float32), copy=True)


class TopLogprobs(NamedTuple):
    """A teacher's K most likely tokens at the temperature of the loss; all others count as one outcome.

    D over these K + 1 outcomes is at most D over the vocabulary, and equal to it where K = V.

    Attributes:
        index_NK: int32 or int64.
        logprobs_NK: their log-probabilities at the temperature.
    """

    index_NK: Tensor
    logprobs_NK: Tensor


Teacher = TeacherStates | TeacherLogits | TopLogprobs


def chunked_distillation(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    teacher: Teacher,
    ce_terms: CrossEntropyTerms,
    terms: DistillationTerms,
    rows: int | None = None,
) -> tuple[TokenSums, Tensor]:
    """The sums over tokens, with the distilled loss as `loss`, and the sum of D, float64.

    Args:
        hidden_ND: the student's last hidden states.
        head_VD: its output matrix.
        labels_N: int64 in [0, V).
        weights_N: factor of each token's loss, or None for 1.
        teacher: of the same tokens; no gradient flows to it.
        ce_terms: of the cross-entropy; `softcap` is that of the student.
        terms: of the distillation.
        rows: tokens per chunk; None: chosen by vocabulary and device.
    """
    dtype = compute_dtype(hidden_ND)
    if isinstance(teacher, TeacherStates):  # cast once
        teacher = teacher._replace(hidden_ND=teacher.hidden_ND.to(dtype), head_VD=teacher.head_VD.to(dtype))

    def score(logits_CV: Tensor, part: slice, exact: bool) -> tuple[Tensor, Tensor]:
        weights_C = None if weights_N is None else weights_N[part].to(logits_CV.dtype)
        student_CV, slope_CV = _capped(logits_CV, ce_terms.softcap)
        sums, grad_CV = chunk_of_logits(logits_CV, labels_N[part], weights_C, ce_terms, exact)
        target = _part_of(teacher, part, dtype)
        kl_C, kl_grad_CV = divergence(student_CV, target, terms)
        factor_C = torch.full_like(kl_C, terms.kl * terms.temperature**2)
        if weights_C is not None:
            factor_C = factor_C * weights_C
        kl_grad_CV.mul_(factor_C[:, None])
        if slope_CV is not None:
            kl_grad_CV.mul_(slope_CV)
        loss = terms.ce * sums[0] + (kl_C * factor_C).double().sum()
        return torch.cat([loss[None], sums[1:], kl_C.double().sum()[None]]), grad_CV.mul_(terms.ce).add_(kl_grad_CV)

    rows = rows or max(1, chunk_rows(len(head_VD), hidden_ND.device.type) // 2)  # twice the logits, half the rows
    loss, others = chunked_head_loss(hidden_ND, head_VD, score, sums=6, rows=rows)
    nll, hits, log_z, squared, kl = others.unbind()
    return TokenSums(loss, nll, hits, log_z, ce_terms.z_loss * squared), kl


def whole_distillation(
    logits_NV: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    teacher: Teacher,
    ce_terms: CrossEntropyTerms,
    terms: DistillationTerms,
) -> tuple[TokenSums, Tensor]:
    """The same from whole logits (already soft-capped), differentiable any number of times."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    sums = whole_cross_entropy(logits_NV, labels_N, weights_N, ce_terms)
    q_NV = (logits_NV / terms.temperature).log_softmax(-1)
    target = _part_of(teacher, slice(0, len(logits_NV)), logits_NV.dtype)
    if isinstance(target, TopLogprobs):
        index_NK, p_NK = target.index_NK.long(), target.logprobs_NK.to(q_NV.dtype)
        rest_N, top_NK = _rest(p_NK), q_NV.gather(-1, index_NK)
        q_rest_N = q_NV.scatter(-1, index_NK, -torch.inf).logsumexp(-1)
        some_N = (rest_N > 0) & q_rest_N.isfinite()
        tail_N = torch.where(some_N, rest_N * (rest_N.clamp_min(1e-30).log() - q_rest_N.where(some_N, 0.0)), 0.0)
        kl_N = (p_NK.exp() * (p_NK - top_NK)).sum(-1) + tail_N
    else:
        p_NV = (target / terms.temperature).log_softmax(-1)
        kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(-1)
        if terms.direction == "reverse":
            kl_N = (q_NV.exp() * (q_NV - p_NV)).sum(-1)
    weighted_N = kl_N if weights_N is None else kl_N * weights_N
    loss = terms.ce * sums.loss + terms.kl * terms.temperature**2 * weighted_N.double().sum()
    return sums._replace(loss=loss), kl_N.detach().double().sum()


def divergence(student_CV: Tensor, target: Tensor | TopLogprobs, terms: DistillationTerms) -> tuple[Tensor, Tensor]:
    """D of each token, and its gradient by the student's logits.

    Args:
        student_CV: logits; overwritten.
        target: the teacher's logits (overwritten), or its most likely tokens.
        terms: temperature and direction.

    Returns:
        (C,) and (C, V).
    """
    T = terms.temperature
    log_q_CV = _log_softmax(student_CV, T)
    if isinstance(target, TopLogprobs):
        return _top_divergence(log_q_CV, target, T)
    log_p_CV = _log_softmax(target, T)
    if terms.direction == "forward":
        p_CV = log_p_CV.exp()
        kl_C = (log_p_CV.sub_(log_q_CV)).mul_(p_CV).sum(-1)
        return kl_C, log_q_CV.exp_().sub_(p_CV).div_(T)
    gap_CV = log_q_CV.sub(log_p_CV)
    q_CV = log_q_CV.exp_()
    kl_C = (q_CV * gap_CV).sum(-1)
    return kl_C, gap_CV.sub_(kl_C[:, None]).mul_(q_CV).div_(T)


def top_logprobs(teacher: TeacherStates | TeacherLogits, k: int, temperature: float, rows: int) -> TopLogprobs:
    """A teacher's k most likely tokens, made a chunk of tokens at a time.

    Args:
        teacher: whose tokens.
        k: how many.
        temperature: of the loss that they are for.
        rows: tokens of a chunk.
    """
    states = teacher[0]
    dtype, count = compute_dtype(states), len(states)
    found = []
    with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
        for start in range(0, count, rows):
            logits_CV = teacher.logits(slice(start, min(start + rows, count)), dtype)
            found.append(_log_softmax(logits_CV, temperature).topk(k, -1))
    values, indices = (torch.cat([piece[i] for piece in found]) for i in (0, 1))
    return TopLogprobs(indices.int(), values.float())


def _part_of(teacher: Teacher, part: slice, dtype: torch.dtype) -> Tensor | TopLogprobs:
    if isinstance(teacher, TopLogprobs):
        return TopLogprobs(teacher.index_NK[part], teacher.logprobs_NK[part])
    with torch.no_grad():
        return teacher.logits(part, dtype)


def _capped(logits_CV: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """A copy of the logits with the soft-cap, and its slope."""
    if softcap is None:
        return logits_CV.clone(), None
    turned_CV = torch.tanh(logits_CV / softcap)
    return turned_CV * softcap, 1 - turned_CV.square()


def _log_softmax(logits_CV: Tensor, temperature: float) -> Tensor:
    """In place."""
    if temperature != 1.0:
        logits_CV.div_(temperature)
    return logits_CV.sub_(logits_CV.logsumexp(-1, keepdim=True))


def _rest(logprobs_NK: Tensor) -> Tensor:
    """The probability of all other tokens, 0 where rounding would make it negative."""
    return (1 - logprobs_NK.double().exp().sum(-1)).clamp_min(0).to(logprobs_NK.dtype)


def _top_divergence(log_q_CV: Tensor, target: TopLogprobs, T: float) -> tuple[Tensor, Tensor]:
    index_CK, log_p_CK = target.index_NK.long(), target.logprobs_NK.to(log_q_CV.dtype)
    p_CK, rest_C = log_p_CK.exp(), _rest(log_p_CK)
    log_q_CK = log_q_CV.gather(-1, index_CK)
    q_CV = log_q_CV.exp_()
    q_rest_C = q_CV.scatter(-1, index_CK, 0.0).sum(-1)
    some_C = (rest_C > 0) & (q_rest_C > 0)
    ratio_C = torch.where(some_C, rest_C / q_rest_C, 0.0)
    tail_C = torch.where(some_C, rest_C * torch.where(some_C, ratio_C, 1.0).log(), 0.0)
    kl_C = (p_CK * (log_p_CK - log_q_CK)).sum(-1) + tail_C
    # d D / d (logit_j / T): q_j - p_j for a token of the K, q_j * (1 - p_rest / q_rest) for any other.
    top_grad_CK = log_q_CK.exp() - p_CK
    grad_CV = q_CV.mul_((1 - ratio_C)[:, None]).scatter_(-1, index_CK, top_grad_CK)
    return kl_C, grad_CV.div_(T)
