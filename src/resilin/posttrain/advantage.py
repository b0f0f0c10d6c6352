"""From scores to advantages: groups of answers to one prompt (GRPO), or values of every token (PPO).

Shapes: R answers, T positions, G answers to a prompt; a mask says which positions hold an answer's tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logp: Tensor, reference: Tensor, kind: KLEstimator) -> Tensor:
    """An estimate of KL(policy || reference) from tokens drawn from the policy (Schulman, "Approximating KL", 2020).

    With d = logp - reference: k1 = d (unbiased), k2 = d^2 / 2 (less spread, biased), k3 = exp(-d) - 1 + d (unbiased
    and never negative).
    """
    d = logp - reference
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    return torch.expm1(-d) + d


def equal_groups(scores_R: Tensor, size: int) -> Tensor:
    """(R / size,) bool: groups whose answers all have the same score, so that nothing can be learnt from them."""
    scores_PG = scores_R.view(-1, size)
    return scores_PG.amax(1) == scores_PG.amin(1)


Norm = Literal["std", "batch_std", "centered"]


def group_advantages(scores_R: Tensor, size: int, norm: Norm) -> Tensor:
    """(R,) float64: each score minus its group's mean, divided by the standard deviation of the group (`std`), of all
    scores (`batch_std`), or by nothing (`centered`).

    (Shao et al., DeepSeekMath, 2024, section 4.1; Liu et al., Dr. GRPO, 2025, for `centered`; Hu et al.,
    REINFORCE++, 2025, for the batch's deviation.) Nothing is added to the deviation, so scaling all scores changes
    nothing; a group of equal scores gives exact zeros.
    """
    scores_PG = scores_R.double().view(-1, size)
    centred_PG = scores_PG - scores_PG.mean(1, keepdim=True)
    equal_P1 = equal_groups(scores_R, size)[:, None]
    if norm == "std" and size > 1:
        centred_PG = centred_PG / scores_PG.std(1, keepdim=True).where(~equal_P1, 1.0)
    elif norm == "batch_std" and not bool(equal_P1.all()):
        centred_PG = centred_PG / scores_PG.std()
    return centred_PG.where(~equal_P1, 0.0).flatten()


def token_rewards(scores_R: Tensor, penalty_RT: Tensor, mask_RT: Tensor) -> Tensor:
    """(R, T): minus the penalty at every token, and the score at the last token of each answer."""
    place_T = torch.arange(mask_RT.shape[1], device=mask_RT.device)
    last_R1 = (mask_RT * (place_T + 1)).amax(1, keepdim=True) - 1
    at_end_RT = (place_T == last_R1) & mask_RT
    return torch.where(mask_RT, scores_R[:, None] * at_end_RT - penalty_RT, 0.0)


def gae(
    rewards_RT: Tensor, values_RT: Tensor, mask_RT: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016, equation 16) and returns.

    An answer's tokens lie side by side; after its last one the value is 0.

    Returns:
        advantages_RT and returns_RT = advantages + values, zero outside the mask.
    """
    advantages_RT = torch.zeros_like(values_RT)
    later_R = torch.zeros_like(values_RT[:, 0])
    next_value_R = torch.zeros_like(later_R)
    for t in range(values_RT.shape[1] - 1, -1, -1):
        here_R = mask_RT[:, t]
        delta_R = rewards_RT[:, t] + gamma * next_value_R - values_RT[:, t]
        later_R = torch.where(here_R, delta_R + gamma * lam * later_R, 0.0)
        next_value_R = torch.where(here_R, values_RT[:, t], 0.0)
        advantages_RT[:, t] = later_R
    return advantages_RT, (advantages_RT + values_RT) * mask_RT


def whitened(values_RT: Tensor, mask_RT: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all valid tokens, zero elsewhere; values without any spread become 0."""
    valid_N = values_RT[mask_RT].double()
    if len(valid_N) < 2 or float(valid_N.max()) == float(valid_N.min()):
        return torch.zeros_like(values_RT)
    scaled_RT = (values_RT.double() - valid_N.mean()) / valid_N.std()
    return (scaled_RT * mask_RT).to(values_RT.dtype)
