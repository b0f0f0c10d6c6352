"""PPO with a value of every token and a KL penalty in the rewards (Schulman et al., 2017; Stiennon et al., 2020).

Shapes: R answers of a rollout, B of a micro-batch, T positions, N answer tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.nouns import Batch, Loss, Mean
from resilin.objective.settings import ObjectiveContext
from resilin.posttrain.actor_critic import ActorCriticModel
from resilin.posttrain.advantage import KLEstimator, gae, kl_estimate, token_rewards, whitened
from resilin.posttrain.policy import PolicyObjective, PolicySettings, valid_of
from resilin.posttrain.policy_loss import PolicyTerms, PolicyTokens
from resilin.posttrain.sequences import label_states

_ROWS_AT_ONCE = 2**14  # positions the value model reads at a time without gradients


class Ppo(PolicySettings):
    """The loss over answers with values; the model is `resilin.posttrain.actor_critic:ActorCritic`."""

    beta: float = Field(default=0.05, ge=0)
    """Weight of the KL penalty that is taken from every token's reward; 0: none, and no reference model."""
    kl: KLEstimator = "k1"
    """How the divergence is estimated."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """What a reward one token later is worth."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """lambda of generalised advantage estimation."""
    whiten: bool = True
    """Give the advantages of a rollout mean 0 and variance 1."""
    value_clip: float = Field(default=0.2, ge=0)
    """How far a value may move from what it was before its gradient stops; 0: anywhere."""
    value_coefficient: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""

    def build(self, context: ObjectiveContext | None = None) -> PpoLoss:
        """The loss; it needs the run."""
        return PpoLoss(self, context)


def critic_of(model: Any) -> ActorCriticModel:
    """The model, if it has a value model.

    Raises:
        TypeError: it has none.
    """
    if not hasattr(model, "value") or not hasattr(model, "policy"):
        raise TypeError(
            f"PPO needs a value model beside the policy; the run's model is a {type(model).__name__}: set model.use = "
            "'resilin.posttrain.actor_critic:ActorCritic'"
        )
    return model  # type: ignore[no-any-return]


class PpoLoss(PolicyObjective):
    """Policy and value loss summed over answer tokens; units are tokens."""

    name = "PPO"
    needs_old = True  # for the KL penalty

    def __init__(self, settings: Ppo, context: ObjectiveContext | None) -> None:
        # The penalty stands in the rewards, so the loss itself has none.
        terms = PolicyTerms(settings.clip_low, settings.clip_high, 0.0, settings.kl, settings.clip_dual)
        super().__init__(settings, context, terms)
        self.settings = settings

    def advantages(self, model: nn.Module, rollout: dict[str, Tensor]) -> None:
        """Values, advantages and returns of every token."""
        value = critic_of(model).value
        device = value.score.weight.device
        mask_RT = valid_of(rollout)
        rows = max(1, _ROWS_AT_ONCE // mask_RT.shape[1])
        values_RT = torch.cat([value(part.to(device)).cpu() for part in rollout["tokens"].split(rows)]) * mask_RT
        penalty_RT = torch.zeros_like(values_RT)
        if self.reference is not None:
            logp_RT = rollout["old_logprobs"]
            penalty_RT = self.settings.beta * kl_estimate(logp_RT, rollout["reference_logprobs"], self.settings.kl)
        rewards_RT = token_rewards(rollout["scores"].to(values_RT.dtype), penalty_RT.to(values_RT.dtype), mask_RT)
        advantages_RT, returns_RT = gae(rewards_RT, values_RT, mask_RT, self.settings.gamma, self.settings.lam)
        if self.settings.whiten:
            advantages_RT = whitened(advantages_RT, mask_RT)
        rollout |= {"values": values_RT, "advantages": advantages_RT, "returns": returns_RT}
        rollout["penalties"] = (penalty_RT * mask_RT).sum(1)

    def learn(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a micro-batch of answers."""
        both, valid_BT = critic_of(model), valid_of(batch)
        states = label_states(both.policy, batch["tokens"], batch["labels"], None, self.temperature)
        advantage_N = batch["advantages"][valid_BT]
        tokens = PolicyTokens(
            advantage_N,
            self.weights(batch, valid_BT),
            self.old_logprobs(batch, valid_BT),
            self.reference_logprobs(batch, valid_BT),
        )
        loss, logs = self.terms.loss(states, tokens, self.common.chunk)
        units, count = valid_BT.sum(), torch.tensor(float(len(batch)), dtype=torch.float64)
        value_loss, clipped = self._value_loss(both, batch, valid_BT)
        logs |= self.rollout_logs(batch)
        logs["value_loss"], logs["value_clipped"] = Mean(value_loss.detach(), units), Mean(clipped, units)
        logs["return"] = Mean(batch["returns"][valid_BT].double().sum(), units)
        logs["penalty"] = Mean(batch["penalties"].double().sum(), count)
        return Loss(loss + self.settings.value_coefficient * value_loss, units, logs)

    def _value_loss(self, both: ActorCriticModel, batch: Batch, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Half the squared error, the larger one of the value and of the value held near what it was."""
        width = int((valid_BT.any(0) * torch.arange(1, valid_BT.shape[1] + 1, device=valid_BT.device)).amax())
        width = max(width, 1)  # answers that were dropped have no labels
        value_N = both.value(batch["tokens"][:, :width])[valid_BT[:, :width]].double()
        old_N, return_N = batch["values"][valid_BT].double(), batch["returns"][valid_BT].double()
        error_N, clipped = (value_N - return_N).square(), torch.zeros((), dtype=torch.float64)
        if self.settings.value_clip:
            near_N = old_N + (value_N - old_N).clamp(-self.settings.value_clip, self.settings.value_clip)
            near_error_N = (near_N - return_N).square()
            clipped = (near_error_N > error_N).double().sum().detach()
            error_N = torch.maximum(error_N, near_error_N)
        return 0.5 * error_N.sum(), clipped
