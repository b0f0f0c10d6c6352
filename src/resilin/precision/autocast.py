"""The precision a run computes in: chosen once, entered around every forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from resilin.precision.probe import measure_peak, one_thread
from resilin.precision.settings import PrecisionSettings

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

WORTH = 1.3
"""How many times faster bf16 must be for `auto` to give up float32's precision."""


@dataclass(frozen=True, slots=True)
class Precision:
    """What was chosen, and why.

    Attributes:
        compute: "fp32" or "bf16".
        device_type: "cpu", "cuda".
        peak_flops: the matrix-product peak measured in that format, FLOP/s: what MFU is relative to.
        reason: one sentence for people.
    """

    compute: Literal["fp32", "bf16"]
    device_type: str
    peak_flops: float
    reason: str

    def autocast(self) -> AbstractContextManager[object]:
        """Around forward passes: bf16 autocast where chosen, nothing otherwise. Backward passes stay outside."""
        if self.compute == "bf16":
            return torch.autocast(self.device_type, torch.bfloat16)
        return nullcontext()


def _words(flops: float) -> str:
    return f"{flops / 1e12:.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.1f} GFLOP/s"


def choose_precision(settings: PrecisionSettings, device: torch.device | str) -> Precision:
    """The precision of a run on `device`, from the settings and a measurement of about a quarter of a second.

    `auto` depends on the measurement, so a run that is resumed should take what was chosen at first.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = settings.tf32
    if settings.compute != "auto":
        compute, why = settings.compute, "as set"
        with one_thread():
            known = measure_peak(device, _DTYPES[compute]).flops
    else:
        compute, known, why = _faster(device)
    peak = measure_peak(device, _DTYPES[compute], known=known, budget=0.12).flops
    return Precision(compute, device.type, max(peak, known), f"{compute}, {why}; peak {_words(max(peak, known))}")


def _faster(device: torch.device) -> tuple[Literal["fp32", "bf16"], float, str]:
    """The format to take, its rate on one thread (or the GPU), and why."""
    with one_thread():
        fp32 = measure_peak(device, torch.float32).flops
        bf16 = measure_peak(device, torch.bfloat16, to_beat=fp32).flops
        if bf16 > WORTH * fp32:  # a hiccup while fp32 was measured would choose a format that may be emulated
            fp32 = max(fp32, measure_peak(device, torch.float32).flops)
    where = "" if device.type == "cuda" else " on one thread"
    measured = f"{_words(bf16)} in bf16 and {_words(fp32)} in fp32{where}"
    if bf16 > WORTH * fp32:
        return "bf16", bf16, f"the faster ({measured})"
    return "fp32", fp32, f"as bf16 is not {WORTH} times faster ({measured})"
