"""Which number format a run computes in, and whether it is compiled."""

from __future__ import annotations

from typing import Literal

from resilin.config import Settings
from resilin.precision.compiled import CompileMode


class PrecisionSettings(Settings):
    """Weights and moments are always float32 masters; this decides what the forward and backward pass compute in."""

    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32; bf16 (autocast over the float32 masters); auto: bf16 where it is measured to be clearly faster."""
    tf32: bool = False
    """On CUDA, let fp32 products round their inputs to TF32: faster, with 10 bits of fraction instead of 23."""
    compile: bool | Literal["blocks"] = False
    """torch.compile: the whole model, or its repeated blocks one by one (one compilation serves all of them)."""
    compile_mode: CompileMode = "default"
    """The mode of torch.compile."""
