"""The argument and options of every command that opens a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from resilin.run.open_model import OpenedModel

DTypeName = Literal["float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
PANEL = "The model"

ModelArgument = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="A run's folder, a checkpoint of it, a Hugging Face folder or a .gguf."),
]
StepOption = Annotated[
    int | None, typer.Option(help="Which checkpoint of a run. Default: the newest.", rich_help_panel=PANEL)
]
TokenizerOption = Annotated[
    Path | None, typer.Option(help="A tokenizer.json, where the model has none.", rich_help_panel=PANEL)
]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a model is opened."""

    step: StepOption = None
    tokenizer: TokenizerOption = None
    dtype: Annotated[DTypeName, typer.Option(help="Of the weights in memory.", rich_help_panel=PANEL)] = "float32"
    device: Annotated[DeviceName, typer.Option(help="auto: the GPU where there is one.", rich_help_panel=PANEL)] = (
        "auto"
    )

    def open(self, path: Path) -> OpenedModel:
        """The model at a path."""
        import torch

        from resilin.run.open_model import open_model

        dtype = getattr(torch, self.dtype)
        return open_model(path, step=self.step, tokenizer=self.tokenizer, dtype=dtype, device=self.device)
