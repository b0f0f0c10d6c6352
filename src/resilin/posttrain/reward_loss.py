"""Learning a reward from pairs: the model of Bradley and Terry.

    -log sigmoid(r_chosen - r_rejected - margin) + centre * (r_chosen + r_rejected)^2

The margin is a field of the batch (Touvron et al., Llama 2, 2023, equation 2); the second term keeps rewards around
zero, which the first leaves open (Eisenstein et al., 2023).

Shapes: B pairs, T positions, R = 2 B rows, N places of the rows joined.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from resilin.keys import Keys
from resilin.nouns import Batch, Loss, Mean, State
from resilin.objective.next_token import IGNORE
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings
from resilin.posttrain.joined_rows import join_rows
from resilin.posttrain.preference_loss import interleaved
from resilin.posttrain.reward_model import RewardModel, with_end
from resilin.posttrain.sequences import joins_rows


class PairwiseReward(ObjectiveSettings):
    """The loss of a reward model; the model gives one number a token (`resilin.posttrain.reward_model:Reward`)."""

    centre: float = Field(default=0.0, ge=0)
    """Weight of the squared sum of both rewards; 0.01 in the paper that proposes it."""
    dropout: bool = True
    """Whether the model's own randomness is on."""

    def build(self, context: ObjectiveContext | None = None) -> PairwiseRewardLoss:
        """The loss."""
        return PairwiseRewardLoss(self)


def rewards_at(model: nn.Module, rows_RT: Tensor, last_R: Tensor, keys: Keys | None) -> Tensor:
    """(R,): the number at one position of each row; what follows it is not read."""
    if not isinstance(model, RewardModel) or not joins_rows(model.decoder, keys):
        rewards_RT: Tensor = model(rows_RT, keys=keys)
        return rewards_RT.gather(1, last_R[:, None])[:, 0]
    joined = join_rows(rows_RT, (last_R + 1).tolist())
    tokens_1N, positions_1N, documents_1N, continues_1N, place_RT = joined
    rewards_1N: Tensor = model(tokens_1N, positions_1N, documents_1N, continues_BT=continues_1N)
    return rewards_1N[0].index_select(0, place_RT.gather(1, last_R[:, None])[:, 0])


class PairwiseRewardLoss:
    """The loss summed over pairs; an answer's reward is read at the token that ends it. Units are pairs."""

    unit = "pairs"

    def __init__(self, settings: PairwiseReward) -> None:
        self.settings = settings

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss, and the logs `accuracy`, `margin`, `rewards/chosen` and `rewards/rejected`."""
        tokens_RT, labels_RT = interleaved(batch)
        kept_B = ((labels_RT != IGNORE).sum(1).view(-1, 2) > 0).all(1)
        rows_RT, last_R = with_end(tokens_RT, labels_RT)
        rows_RT = rows_RT[:, : int(last_R.max()) + 1]
        of_rows = None
        if keys is not None and self.settings.dropout:
            of_rows = replace(keys, slots_B=torch.stack((keys.slots_B, keys.slots_B + 2**31), 1).flatten())
        rewards_B2 = rewards_at(model, rows_RT, last_R, of_rows).double().view(-1, 2)
        chosen_B, rejected_B = rewards_B2.unbind(1)
        margin_B = batch.get("margin")
        difference_B = chosen_B - rejected_B
        loss_B = F.softplus(-(difference_B if margin_B is None else difference_B - margin_B.double()))
        if self.settings.centre:
            loss_B = loss_B + self.settings.centre * (chosen_B + rejected_B).square()
        units, kept = kept_B.sum(), kept_B.double()
        values = {
            "accuracy": (difference_B > 0).double(),
            "margin": difference_B,
            "rewards/chosen": chosen_B,
            "rewards/rejected": rejected_B,
        }
        logs = {name: Mean((value.detach() * kept).sum(), units) for name, value in values.items()}
        return Loss((loss_B * kept).sum(), units, logs)

    def state_dict(self) -> State:
        """Nothing: the loss has no state."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing to take back."""
