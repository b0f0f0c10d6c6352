"""What a sampled token costs a policy: the clipped ratio of PPO, and a KL penalty with a gradient.

With ratio = exp(logp - old) and advantage A: max(-A ratio, -A clip(ratio, 1 - low, 1 + high)) (Schulman et al., PPO,
2017, equation 7; Yu et al., DAPO, 2025, for two bounds), plus beta times an estimate of the KL to the reference. For a
negative advantage the loss can be bounded too: min(loss, -A dual) (Ye et al., dual-clip PPO, 2020, equation 5). The
ratio of a token can be that of its whole answer, exp(mean(logp - old)) (Zheng et al., GSPO, 2025, equation 7).

Shapes: N answer tokens of all rows, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resilin.nouns import Log, Mean
from resilin.posttrain.advantage import KLEstimator, kl_estimate
from resilin.posttrain.logprob_loss import Part
from resilin.posttrain.sequences import LabelStates

_BLOCK = 64  # tokens stand alone, so any border between chunks will do


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """What is known of the N tokens before the model is asked again.

    Attributes:
        advantage_N: float.
        weight_N: each token's share in the loss.
        old_N: log-probability when it was sampled; None: the same as now (the rollout serves one update).
        reference_N: under the reference; None: no KL penalty.
    """

    advantage_N: Tensor
    weight_N: Tensor
    old_N: Tensor | None = None
    reference_N: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """The loss of a token.

    Attributes:
        clip_low, clip_high: how far the ratio may fall below and rise above 1 before its gradient stops.
        beta: weight of the KL penalty.
        kl: its estimator.
        clip_dual: where the loss of a token with a negative advantage A ends: at -A times this; None: nowhere.
        whole_answers: whether all tokens of an answer have its geometric mean ratio.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    kl: KLEstimator = "k3"
    clip_dual: float | None = None
    whole_answers: bool = False

    def loss(
        self, states: LabelStates, tokens: PolicyTokens, chunk: int | None = None
    ) -> tuple[Tensor, dict[str, Log]]:
        """The weighted sum over tokens, and the logs `ratio`, `clipped`, `logp`, `kl` and `kl_old` per token."""
        count = len(states.labels_N)
        groups = [min(_BLOCK, count - at) for at in range(0, count, _BLOCK)]
        if self.whole_answers:
            groups = [tokens_of_row for tokens_of_row in states.counts if tokens_of_row]
        sums: list[Tensor] = []

        def score(logp_C: Tensor, part: Part) -> Tensor:
            at = part.tokens
            old_C = logp_C.detach() if tokens.old_N is None else tokens.old_N[at]
            gained_C = logp_C - old_C
            if self.whole_answers:
                gained_C = _means(gained_C, groups[part.groups])
            ratio_C = torch.exp(gained_C)
            pull_C = -tokens.advantage_N[at].to(logp_C.dtype)
            bounded_C = ratio_C.clamp(1 - self.clip_low, 1 + self.clip_high)
            loss_C = torch.maximum(pull_C * ratio_C, pull_C * bounded_C)
            if self.clip_dual is not None:
                loss_C = torch.where(pull_C > 0, torch.minimum(loss_C, pull_C * self.clip_dual), loss_C)
            kl_C = torch.zeros_like(logp_C)
            if tokens.reference_N is not None:
                kl_C = kl_estimate(logp_C, tokens.reference_N[at].to(logp_C.dtype), self.kl)
                if self.beta:
                    loss_C = loss_C + self.beta * kl_C
            with torch.no_grad():
                clipped_C = pull_C * bounded_C > pull_C * ratio_C
                if self.clip_dual is not None:
                    clipped_C = clipped_C | ((pull_C > 0) & (ratio_C > self.clip_dual))
                parts = (ratio_C, clipped_C, logp_C, kl_C, kl_estimate(old_C, logp_C, "k3"))
                sums.append(torch.stack([x.detach().double().sum() for x in parts]))
            return (loss_C * tokens.weight_N[at].to(logp_C.dtype)).double().sum()

        loss = states.loss(groups, score, chunk)
        total = torch.stack(sums).sum(0) if sums else torch.zeros(5, dtype=torch.float64, device=states.labels_N.device)
        units = torch.tensor(count, device=total.device)
        names = ("ratio", "clipped", "logp", "kl", "kl_old")
        return loss, {name: Mean(value, units) for name, value in zip(names, total, strict=True)}


def _means(values_C: Tensor, counts: Sequence[int]) -> Tensor:
    """Each answer's mean at each of its tokens."""
    sums_R = torch.stack([part.sum() for part in values_C.split(list(counts))]) if counts else values_C[:0]
    return rows_to_tokens(sums_R / torch.tensor(counts, device=values_C.device), counts)


def rows_to_tokens(values_R: Tensor, counts: Sequence[int]) -> Tensor:
    """(N,): each row's value at each of its tokens."""
    return torch.repeat_interleave(values_R, torch.tensor(counts, device=values_R.device))
