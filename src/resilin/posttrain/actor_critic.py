"""A policy and the value model that judges its states, trained together.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor, nn

from resilin.config import component
from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.settings import ModelContext, ModelSettings
from resilin.objective.vocabulary import VocabularyShard, shard_of
from resilin.posttrain.reward_model import RewardModel


class ActorCriticModel(nn.Module):
    """Called, it is the policy.

    Attributes:
        policy: a decoder.
        value: what follows from here, at every position.
    """

    def __init__(self, policy: Decoder, value: RewardModel) -> None:
        super().__init__()
        self.policy, self.value = policy, value

    @property
    def settings(self) -> Any:
        """The policy's."""
        return self.policy.settings

    @property
    def head_weight(self) -> Tensor:
        """The policy's."""
        return self.policy.head_weight

    @property
    def vocabulary_shard(self) -> VocabularyShard | None:
        """The policy's."""
        return shard_of(self.policy)

    def plain_form(self) -> nn.Module:
        """The policy: what writes and is kept."""
        return self.policy

    def logits(self, hidden: Tensor) -> Tensor:
        """The policy's."""
        return self.policy.logits(hidden)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        *,
        keys: Keys | None = None,
    ) -> Any:
        """What the policy gives."""
        return self.policy(tokens_BT, positions_BT, documents_BT, keys=keys)


class ActorCritic(ModelSettings):
    """A policy, and a value model that begins as a reward model, or as the policy with a head of zeros."""

    model: Annotated[ModelSettings, component("resilin.models.pretrained:Pretrained")]
    """The policy."""
    value: Annotated[ModelSettings, component("resilin.posttrain.reward_model:PretrainedReward")] | None = None
    """The value model; left out: a second copy of the policy's initial weights, with a head of zeros."""

    def build(self, context: ModelContext) -> ActorCriticModel:
        """Both models.

        Raises:
            ValueError: one of them is of another kind, or their vocabularies differ.
        """
        policy = self.model.build(context)
        if not isinstance(policy, Decoder):
            raise ValueError(f"the policy should be a decoder, and model.model builds a {type(policy).__name__}")
        if self.value is None:
            decoder = self.model.build(context)
            assert isinstance(decoder, Decoder)
            return ActorCriticModel(policy, RewardModel(decoder))
        value = self.value.build(context)
        if not isinstance(value, RewardModel):
            raise ValueError(
                f"the value model should be a reward model, and model.value builds a {type(value).__name__}"
            )
        mine, other = policy.settings.vocab_size, value.decoder.settings.vocab_size
        if mine != other:
            raise ValueError(f"the policy knows {mine} tokens, the value model {other}: they need the same tokenizer")
        return ActorCriticModel(policy, value)
