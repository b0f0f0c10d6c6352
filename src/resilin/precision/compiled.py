"""Compiling a model as a whole, or block by block."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from resilin.models import uncompiled

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


def compile_model(
    model: nn.Module, what: bool | Literal["blocks"], mode: CompileMode, backend: str = "inductor"
) -> nn.Module | None:
    """What to call in place of the model; None: the model itself.

    Args:
        model: with "blocks", its `blocks` (repeated layers) are compiled in place, once for all of them: parameter
            names stay, and a cold start takes a fraction of the time that the whole model takes.
        what: False: nothing; True: the whole model; "blocks".
        mode: of torch.compile.
        backend: of torch.compile; "aot_eager" takes the graphs apart and runs them as they are.

    Raises:
        ValueError: "blocks" of a model that has none.
    """
    if what:
        uncompiled.begin_compiling()
    if what == "blocks":
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(
                f"precision.compile = 'blocks' needs a model with a list of `blocks`, and {type(model).__name__} has "
                "none: use true to compile it as a whole"
            )
        for block in blocks:
            block.compile(mode=mode, backend=backend)
        return None
    return torch.compile(model, mode=mode, backend=backend) if what else None  # type: ignore[return-value]
