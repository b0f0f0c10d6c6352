"""A policy and the value model that judges its states, trained together.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from typing import Annotated

from resilin.config import component
from resilin.models.around import AroundDecoder
from resilin.models.decoder import Decoder
from resilin.models.settings import ModelContext, ModelSettings
from resilin.posttrain.reward_model import RewardModel


class ActorCriticModel(AroundDecoder):
    """Called, it is the policy.

    Attributes:
        policy: a decoder.
        value: what follows from here, at every position.
    """

    def __init__(self, policy: Decoder, value: RewardModel) -> None:
        super().__init__()
        self.policy, self.value = policy, value

    @property
    def inner(self) -> Decoder:
        """The policy: what writes and is kept."""
        return self.policy


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
