"""Start from weights that exist: a Hugging Face folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext, ModelSettings
from resilin.models.weight_files import ModelFolderError


class Pretrained(ModelSettings):
    """A decoder with the weights of a Hugging Face folder (config.json + safetensors) or a .gguf file.

    A run's own folder is first exported: `resilin export runs/mine folder`.
    """

    path: Path
    """The folder or file."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the residual stream, while training."""
    recompute: Literal["none", "block", "selective"] = "none"
    """Activation checkpointing, as `resilin.models.decoder_settings:DecoderSettings` has it."""
    offload: Literal["none", "host", "disk"] = "none"
    """Where the inputs of recomputed blocks wait, likewise."""
    mlp_tiles: Annotated[int, Field(gt=0)] | Literal["auto"] = 1
    """Tiles of tokens that the feed-forward takes one after another, likewise."""
    attention_backend: Literal["sdpa", "flex", "eager"] | None = None
    """How attention is computed; left out: as suits the model."""

    def build(self, context: ModelContext) -> nn.Module:
        """The decoder, in float32 on the CPU.

        Raises:
            ModelFolderError: what is missing, broken or unsupported; or the source has more tokens than the model.
        """
        if self.path.suffix == ".gguf":
            from resilin.models.gguf import load_gguf

            loaded = load_gguf(self.path)
        else:
            from resilin.models.huggingface import load_pretrained

            loaded = load_pretrained(self.path)
        model = self._wanted(loaded.settings, context).on_meta()
        with torch.no_grad():
            model.load_state_dict(loaded.state_dict(), assign=True)
        return model

    def outline(self, context: ModelContext) -> nn.Module:
        """The decoder on the meta device; of its files only the description is read.

        Raises:
            ModelFolderError: as `build`, for what the description tells.
        """
        if self.path.suffix == ".gguf":
            from resilin.models.gguf import gguf_settings

            stored = gguf_settings(self.path)
        else:
            from resilin.models.huggingface import folder_settings

            stored = folder_settings(self.path)
        return self._wanted(stored, context).on_meta()

    def _wanted(self, stored: DecoderSettings, context: ModelContext) -> DecoderSettings:
        known, asked = stored.vocab_size, context.vocab_size
        if asked is not None and asked > known:
            raise ModelFolderError(
                f"{self.path}: knows {known} tokens, the source's tokenizer has {asked}: set source.tokenizer to the "
                "model's own"
            )
        names = ("dropout", "recompute", "offload", "mlp_tiles", "attention_backend")
        wanted = {name: getattr(self, name) for name in names}
        tree = stored.model_dump() | {name: value for name, value in wanted.items() if value is not None}
        return type(stored).model_validate(tree)
