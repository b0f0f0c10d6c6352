"""What every model's settings offer: a `build` that makes the module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from resilin.config import Settings


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What a model may need to know of the run.

    Attributes:
        seed: of the run; initial weights are a function of it and of each parameter's name.
        vocab_size: of the source, used where the model's own settings leave it open; None for no source of tokens.
    """

    seed: int
    vocab_size: int | None = None


class ModelSettings(Settings):
    """The base of all model settings."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "build" in vars(cls) and "outline" not in vars(cls):  # an inherited one is of what the parent builds
            cls.outline = ModelSettings.outline  # type: ignore[method-assign]

    def build(self, context: ModelContext) -> nn.Module:
        """The model on the CPU, with its initial weights."""
        raise TypeError(
            f"{type(self).__name__} is a base class: choose a model with model.use = 'package.module:Class'"
        )

    def outline(self, context: ModelContext) -> nn.Module | None:
        """The model with its parameters on the meta device: shapes, formats and what is trained, but no memory.

        None where only building the model tells.
        """
        return None
