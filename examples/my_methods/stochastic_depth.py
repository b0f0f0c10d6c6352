"""A Model transform: whole blocks are skipped at random while training (stochastic depth, Huang et al., 2016)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from resilin.config import component
from resilin.keys import Keys
from resilin.models.settings import ModelContext, ModelSettings


class StochasticDepth(ModelSettings):
    """Skip block l of L with probability `skip * (l + 1) / L`, sample by sample."""

    skip: float = Field(default=0.1, ge=0, lt=1)
    """The probability of the last block."""
    model: Annotated[ModelSettings, component("resilin.models.decoder_settings:DecoderSettings")] = Field(
        default_factory=dict, validate_default=True
    )
    """A decoder; anything with a list of residual `blocks`."""

    def build(self, context: ModelContext) -> nn.Module:
        """The model, still a decoder with the same parameter names: it exports and generates as before."""
        model = self.model.build(context)
        blocks: Any = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(f"stochastic depth needs a model with `blocks`; {type(model).__name__} has none")
        for layer, block in enumerate(blocks):
            block.register_forward_hook(_Skip(layer, self.skip * (layer + 1) / len(blocks)))
        return model


class _Skip:
    """A forward hook: the block's change of the residual stream, or nothing."""

    def __init__(self, layer: int, probability: float) -> None:
        self.layer, self.probability = layer, probability

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        x_BTD: Tensor = args[0]
        keys: Keys | None = args[3]
        if keys is None:  # evaluation
            return output
        # Keyed by (seed, step, slot, this name): the same choice in any micro-batch, on any worker, after a resume.
        drawn_B = keys.fold(self.layer).fold("stochastic depth").uniform((), x_BTD.device)
        factor_B = (drawn_B >= self.probability).to(x_BTD.dtype) / (1 - self.probability)
        return x_BTD + factor_B[:, None, None] * (output[0] - x_BTD), output[1]
