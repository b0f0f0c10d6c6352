"""Training part of the chains of a model that exists: settings that stand around any other model's.

[model]                                       a trained model, and a new chain behind it
use = "resilin.nested.chain_models:Expanded"
heads = 8
model = { use = "resilin.models.pretrained:Pretrained", path = "models/tinyllama" }

[model]                                       a model of chains, of which the later ones are trained
use = "resilin.nested.chain_models:ChainTuned"
frozen = 1
model = { use = "resilin.run.trained:Trained", path = "runs/chains" }
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from resilin.config import component
from resilin.models.chain_freeze import trained_again
from resilin.models.settings import ModelContext, ModelSettings
from resilin.nested.budgets import BudgetError
from resilin.nested.chain_expand import expand
from resilin.nested.in_place import decoder_in

_Model = Annotated[ModelSettings, component("resilin.models.decoder_settings:DecoderSettings")]


class Expanded(ModelSettings):
    """A trained model with one more chain, which alone is trained; see `resilin.nested.chain_expand`."""

    model: _Model = Field(default_factory=dict, validate_default=True)
    """The trained model: of one chain, or a decoder of chains."""
    heads: int = Field(gt=0)
    """Query heads of the new chain; its width is in the proportion that they have in the model."""
    neurons: int | None = Field(default=None, gt=0)
    """Of its feed-forward; left out: in proportion."""
    share_keys: bool | None = None
    """CoLM-Air: the new chain reads the keys and values that are there; left out: as the model's chains do."""
    frozen: int | None = Field(default=None, ge=0)
    """Leading chains that are not trained; left out: all but the new one."""

    def build(self, context: ModelContext) -> nn.Module:
        """The expanded decoder.

        Raises:
            BudgetError: the new chain does not come out even.
        """
        return self._expanded(self.model.build(context), context)

    def outline(self, context: ModelContext) -> nn.Module | None:
        """The same on the meta device.

        Raises:
            BudgetError: as `build`.
        """
        inner = self.model.outline(context)
        return None if inner is None else self._expanded(inner, context)

    def _expanded(self, model: nn.Module, context: ModelContext) -> nn.Module:
        made = expand(model, self.heads, neurons=self.neurons, share_keys=self.share_keys, seed=context.seed)
        return made if self.frozen is None else _tuned(made, frozen=self.frozen)


class ChainTuned(ModelSettings):
    """A decoder of chains of which only some are trained."""

    model: _Model = Field(default_factory=dict, validate_default=True)
    """The decoder of chains."""
    frozen: int | None = Field(default=None, ge=0)
    """Leading chains that are not trained; left out: as the model's own settings say."""
    trained: Literal["all", "head"] | None = None
    """Of the other chains: everything, or the output matrix alone; left out: as the model's own settings say."""

    def build(self, context: ModelContext) -> nn.Module:
        """The decoder.

        Raises:
            BudgetError: it has no chains, or all would be frozen.
        """
        return _tuned(self.model.build(context), frozen=self.frozen, trained=self.trained)

    def outline(self, context: ModelContext) -> nn.Module | None:
        """The same on the meta device.

        Raises:
            BudgetError: as `build`.
        """
        inner = self.model.outline(context)
        return None if inner is None else _tuned(inner, frozen=self.frozen, trained=self.trained)


def _tuned(model: nn.Module, **changes: Any) -> nn.Module:
    """The same model with other settings of what is trained; those that are None stay."""
    decoder = decoder_in(model)
    chains = decoder.settings.chains
    if chains is None:
        raise BudgetError("chains can be frozen in decoders of chains, and this one has none: expand it first")
    told = {name: value for name, value in changes.items() if value is not None}
    if told.get("frozen", 0) >= len(chains.sizes):
        raise BudgetError(f"frozen is {told['frozen']} of {len(chains.sizes)} chains: nothing is left to train")
    decoder.settings = decoder.settings.model_copy(update={"chains": chains.model_copy(update=told)})
    return trained_again(model)
