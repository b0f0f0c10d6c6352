"""Whether loops still change anything: how hidden states move from loop to loop (LoopFormer, 2026, its figures).

Early-exit loops stagnate: states after later loops are nearly those after earlier ones. The paper does not define its
curvature, anisotropy and entropy; those of here are said below.

Shapes: B rows, T tokens, N tokens of all rows, D hidden size, M loops.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.inference.scoring import evaluating
from resilin.nested.budgets import Budget
from resilin.nested.in_place import budget, decoder_in


@dataclass(frozen=True, slots=True)
class LoopDiagnostics:
    """How hidden states move, a number for each loop.

    Attributes:
        cosine: of a token's state with that before the loop, the mean over tokens.
        cka: linear CKA (Kornblith et al., 2019) of the states after each two loops, M x M.
        curvature: the mean angle in radians between consecutive differences of states along the tokens of a row.
        anisotropy: the mean cosine of the states of two different tokens of a row.
        entropy: of the eigenvalues of the Gram matrix of a row's states, scaled to sum to 1, in nats; mean over rows.
    """

    cosine: tuple[float, ...]
    cka: tuple[tuple[float, ...], ...]
    curvature: tuple[float, ...]
    anisotropy: tuple[float, ...]
    entropy: tuple[float, ...]


def loop_states(model: nn.Module, tokens_BT: Tensor, wanted: Budget | None = None) -> list[Tensor]:
    """Hidden states before the first loop and after each one, M + 1 times (B, T, D), before the last norm.

    Args:
        model: a looped decoder.
        tokens_BT: rows without padding.
        wanted: the loops; None: all.
    """
    decoder = decoder_in(model)
    states: list[Tensor] = []
    skipped = wanted.skip if wanted is not None else ()
    here = [block for layer, block in enumerate(decoder.blocks) if layer not in skipped]

    def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if not states:
            states.append(arguments[0])

    def after(_: nn.Module, __: object, output: tuple[Tensor, Tensor | None]) -> None:
        states.append(output[0])

    handles = [here[0].register_forward_pre_hook(before), here[-1].register_forward_hook(after)]
    try:
        with evaluating(decoder), budget(decoder, wanted or Budget()):
            decoder(tokens_BT)
    finally:
        for handle in handles:
            handle.remove()
    return states


def linear_cka(x_ND: Tensor, y_ND: Tensor) -> float:
    """Linear CKA: |Y'X|^2 / (|X'X| |Y'Y|) of centred states, in [0, 1]; 1 for states that differ by a rotation."""
    x_ND, y_ND = (z.double() - z.double().mean(0) for z in (x_ND, y_ND))
    both = torch.linalg.matrix_norm(y_ND.T @ x_ND).square()
    return float(both / (torch.linalg.matrix_norm(x_ND.T @ x_ND) * torch.linalg.matrix_norm(y_ND.T @ y_ND)))


def curvature(x_BTD: Tensor) -> float:
    """The mean angle between consecutive differences along the tokens, in radians; rows have at least 3 tokens."""
    steps = x_BTD.double().diff(dim=1)
    cosines = F.cosine_similarity(steps[:, 1:], steps[:, :-1], dim=-1)
    return float(cosines.clamp(-1, 1).acos().mean())


def anisotropy(x_BTD: Tensor) -> float:
    """The mean cosine of two different tokens of a row."""
    unit = F.normalize(x_BTD.double(), dim=-1)
    B, T, _ = unit.shape
    total = unit.sum(1).square().sum() - B * T  # each token with itself: 1
    return float(total / (B * T * (T - 1)))


def gram_entropy(x_BTD: Tensor) -> float:
    """The entropy of the eigenvalues of a row's Gram matrix, scaled to sum to 1; the mean over rows, in nats."""
    values = torch.linalg.svdvals(x_BTD.double()).square()
    shares = values / values.sum(-1, keepdim=True)
    return float(torch.special.entr(shares).sum(-1).mean())


def diagnose(model: nn.Module, tokens_BT: Tensor, wanted: Budget | None = None) -> LoopDiagnostics:
    """How hidden states move from loop to loop; the arguments are those of `loop_states`."""
    states = loop_states(model, tokens_BT, wanted)
    after = [state.flatten(0, 1) for state in states[1:]]
    cosines = [F.cosine_similarity(a.double(), b.double(), dim=-1).mean() for a, b in pairwise(states)]
    return LoopDiagnostics(
        cosine=tuple(float(one) for one in cosines),
        cka=tuple(tuple(linear_cka(a, b) for b in after) for a in after),
        curvature=tuple(curvature(state) for state in states[1:]),
        anisotropy=tuple(anisotropy(state) for state in states[1:]),
        entropy=tuple(gram_entropy(state) for state in states[1:]),
    )
