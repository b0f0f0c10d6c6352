"""GRPO: answers to one prompt are judged against each other (Shao et al., DeepSeekMath, 2024).

Shapes: R answers of a rollout, B of a micro-batch, T positions, N answer tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.nouns import Batch, Loss, Mean
from resilin.objective.settings import ObjectiveContext
from resilin.posttrain.advantage import KLEstimator, Norm, equal_groups, group_advantages
from resilin.posttrain.policy import PolicyObjective, PolicySettings, valid_of
from resilin.posttrain.policy_loss import PolicyTerms, PolicyTokens, rows_to_tokens
from resilin.posttrain.rollout import decoder_of
from resilin.posttrain.sequences import label_states
from resilin.posttrain.well_learned import WellLearned, answer_entropies


class Grpo(PolicySettings):
    """The loss over groups of answers; the source is `resilin.posttrain.rollouts:Rollouts`."""

    beta: float = Field(default=0.01, ge=0)
    """Strength of the pull to the reference, a term of the loss; 0: there is none, and no reference model."""
    kl: KLEstimator = "k3"
    """How the divergence is estimated."""
    advantage: Norm = "std"
    """A score minus its group's mean; divided by the standard deviation of the group, of all scores, or by nothing."""
    token_loss: Literal["dapo", "sequence_mean", "constant"] = "dapo"
    """dapo: every token of the batch counts the same; sequence_mean: every answer does; constant: the sum over an
    answer's tokens is divided by source.max_new_tokens, so that long answers are not favoured (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """token: each token has its own ratio of new to old probability; sequence: its answer's geometric mean (GSPO, which
    clips at about 3e-4)."""

    well_learned: WellLearned | None = None
    """Counts answers less that the model is already sure of, to prompts that it answers well (WPSM)."""

    def build(self, context: ObjectiveContext | None = None) -> GrpoLoss:
        """The loss; it needs the run."""
        return GrpoLoss(self, context)


class GrpoLoss(PolicyObjective):
    """The loss summed over answer tokens (dapo; units are tokens) or answers (the others; units are answers)."""

    name = "GRPO"

    def __init__(self, settings: Grpo, context: ObjectiveContext | None) -> None:
        terms = PolicyTerms(
            settings.clip_low,
            settings.clip_high,
            settings.beta,
            settings.kl,
            settings.clip_dual,
            whole_answers=settings.ratio == "sequence",
        )
        super().__init__(settings, context, terms)
        self.settings = settings
        self.unit = "tokens" if settings.token_loss == "dapo" else "answers"
        self.group: int = self.source.settings.samples_per_prompt
        if self.group < 2:
            raise ValueError("GRPO compares answers to one prompt: set source.samples_per_prompt to 2 or more")

    def advantages(self, model: nn.Module, rollout: dict[str, Tensor]) -> None:
        """One number an answer."""
        rollout["advantages"] = group_advantages(rollout["scores"], self.group, self.settings.advantage)
        rollout["equal"] = equal_groups(rollout["scores"], self.group).repeat_interleave(self.group)
        if self.settings.well_learned is not None:
            policy = decoder_of(model)
            device = policy.embed.weight.device
            entropy_R = answer_entropies(
                policy, rollout["tokens"].to(device), rollout["labels"].to(device), self.temperature
            ).cpu()
            rollout["well_learned"] = self.settings.well_learned.found(entropy_R, rollout["verified"], self.group)

    def learn(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a micro-batch of answers."""
        policy, valid_BT = getattr(model, "policy", model), valid_of(batch)
        states = label_states(policy, batch["tokens"], batch["labels"], None, self.temperature)
        weight_B = torch.ones(len(batch), dtype=torch.float64, device=valid_BT.device)
        if self.settings.well_learned is not None:
            weight_B = weight_B - self.settings.well_learned.cut * batch["well_learned"].double()
        counts_B = valid_BT.sum(1)
        units = counts_B.sum()
        if self.settings.token_loss == "sequence_mean":
            weight_B, units = weight_B / counts_B.clamp(min=1), (counts_B > 0).sum()
        elif self.settings.token_loss == "constant":
            weight_B, units = weight_B / self.source.settings.max_new_tokens, (counts_B > 0).sum()
        tokens = PolicyTokens(
            rows_to_tokens(batch["advantages"], states.counts),
            rows_to_tokens(weight_B, states.counts) * self.weights(batch, valid_BT),
            self.old_logprobs(batch, valid_BT),
            self.reference_logprobs(batch, valid_BT),
        )
        loss, logs = self.terms.loss(states, tokens, self.common.chunk)
        count = torch.tensor(float(len(batch)), dtype=torch.float64)
        equal = Mean(batch["equal"].double().sum(), count)
        return Loss(loss, units, {**logs, **self.rollout_logs(batch), "equal_groups": equal})
