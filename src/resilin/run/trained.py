"""The model of a finished run as a model to start from, or as a reference."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from resilin.models.chain_freeze import trained_again
from resilin.models.settings import ModelContext, ModelSettings
from resilin.run.open_model import OpenModelError, open_model


class Trained(ModelSettings):
    """The decoder of a run's folder, or of one of its checkpoints, without exporting it first."""

    path: Path
    """The run's folder."""
    step: int | None = None
    """Which checkpoint; left out: the newest."""

    def build(self, context: ModelContext) -> nn.Module:
        """The decoder, in float32 on the CPU, ready to train.

        Raises:
            OpenModelError: there is no such run, or its model has fewer tokens than the source.
        """
        model = open_model(self.path, step=self.step, device="cpu").model
        known, asked = model.settings.vocab_size, context.vocab_size
        if asked is not None and asked > known:
            raise OpenModelError(
                f"{self.path}: knows {known} tokens, the source's tokenizer has {asked}: use the tokenizer of that run"
            )
        return trained_again(model)
