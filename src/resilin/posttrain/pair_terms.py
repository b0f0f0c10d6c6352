"""What a pair of answers costs, given the log-probabilities of both: DPO and its relatives.

With d = (log pi(y_c) - log ref(y_c)) - (log pi(y_r) - log ref(y_r)), each log-probability the sum over the answer's
tokens or, averaged, their mean:

    dpo       -log sigmoid(beta d)                     Rafailov et al., 2023, equation 7
    dpo_norm  the same with averages                   Lambert et al., Tulu 3, 2024, section 5
    ipo       (d - 1 / (2 beta))^2                     Azar et al., 2023, equation 17
    simpo     -log sigmoid(beta (a_c - a_r - ratio)), averages, no reference, margin gamma = ratio * beta
                                                       Meng et al., 2024, equation 6
    wpo       dpo times min(1, pi-average_c * pi-average_r), without a gradient through it
                                                       Zhou et al., 2024

Shapes: P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PairLoss = Literal["dpo", "dpo_norm", "ipo", "simpo", "wpo"]

DEFAULT_BETA: dict[str, float] = {"dpo": 0.1, "dpo_norm": 5.0, "ipo": 0.1, "simpo": 2.0, "wpo": 0.1}
"""Per sequence about 0.1, per token about 5: an averaged log-ratio is a hundred times smaller."""
AVERAGED = frozenset({"dpo_norm", "ipo", "simpo"})


class Answers(NamedTuple):
    """The answers of P pairs on one side.

    Attributes:
        logp_P: float64, summed log-probability under the policy.
        reference_P: the same under the reference; zeros for a loss without one.
        length_P: labelled tokens.
    """

    logp_P: Tensor
    reference_P: Tensor
    length_P: Tensor


class PairCosts(NamedTuple):
    """Each (P,): the loss, its argument z, and the implicit rewards of both answers."""

    loss_P: Tensor
    z_P: Tensor
    chosen_P: Tensor
    rejected_P: Tensor


@dataclass(frozen=True, slots=True)
class PairTerms:
    """One of the losses.

    Attributes:
        kind: which.
        beta: its scale.
        averaged: log-probabilities per token instead of per answer.
        smoothing: s: (1 - s) * -log sigmoid(z) + s * -log sigmoid(-z), for labels that are wrong that often.
        margin_ratio: gamma / beta of simpo.
    """

    kind: PairLoss
    beta: float
    averaged: bool
    smoothing: float = 0.0
    margin_ratio: float = 0.3

    def __call__(self, chosen: Answers, rejected: Answers) -> PairCosts:
        """The costs of the pairs."""
        chosen_P, rejected_P = self.beta * self._gain(chosen), self.beta * self._gain(rejected)
        z_P = chosen_P - rejected_P
        if self.kind == "ipo":
            difference_P = z_P / self.beta - 1 / (2 * self.beta)
            return PairCosts(difference_P.square(), z_P, chosen_P, rejected_P)
        if self.kind == "simpo":
            z_P = z_P - self.beta * self.margin_ratio
        loss_P = (1 - self.smoothing) * F.softplus(-z_P) + self.smoothing * F.softplus(z_P)
        if self.kind == "wpo":
            both_P = sum(side.logp_P / side.length_P.clamp(min=1) for side in (chosen, rejected))
            loss_P = loss_P * torch.as_tensor(both_P).detach().exp().clamp(max=1.0)
        return PairCosts(loss_P, z_P, chosen_P, rejected_P)

    def _gain(self, side: Answers) -> Tensor:
        gain_P = side.logp_P if self.kind == "simpo" else side.logp_P - side.reference_P
        return gain_P / side.length_P.clamp(min=1) if self.averaged else gain_P
