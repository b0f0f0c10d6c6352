"""Which number format a run computes in, and whether it is compiled."""

from __future__ import annotations

from typing import Literal

from resilin.config import Settings


class PrecisionSettings(Settings):
    """Weights and moments are always float32 masters; this decides what matrix products are computed in."""

    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32, bf16 (autocast over float32 masters), or the faster of both as measured at start."""
    tf32: bool = False
    """Let CUDA round the inputs of fp32 products to TF32 (10 bits of fraction instead of 23)."""
    compile: bool = False
    """Compile the model with `torch.compile`."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """The mode of `torch.compile`."""
