"""The precision a run computes in: chosen once, entered around every forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from resilin.precision.probe import measure_peak
from resilin.precision.settings import PrecisionSettings

_WORTH = 1.3  # bf16 loses precision: take it only where it is clearly faster


@dataclass(frozen=True, slots=True)
class Precision:
    """What was chosen.

    Attributes:
        compute: "fp32" or "bf16".
        device_type: "cpu", "cuda", ...
        peak_flops: measured matrix-product peak in that format, FLOP/s; MFU is relative to it.
        reason: one sentence for the log.
    """

    compute: str
    device_type: str
    peak_flops: float
    reason: str

    def autocast(self) -> AbstractContextManager[object]:
        """Around forward passes: bf16 autocast where chosen, nothing otherwise."""
        if self.compute == "bf16":
            return torch.autocast(self.device_type, torch.bfloat16)
        return nullcontext()


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.1f} GFLOP/s"


def choose_precision(settings: PrecisionSettings, device: torch.device | str) -> Precision:
    """The precision of a run on `device`, from the settings and a measurement of at most about 0.3 s."""
    device = torch.device(device)
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32
    if settings.compute != "auto":
        dtype = torch.bfloat16 if settings.compute == "bf16" else torch.float32
        peak = measure_peak(device, dtype).flops
        return Precision(settings.compute, device.type, peak, f"{settings.compute} as set, peak {_rate(peak)}")
    fp32 = measure_peak(device, torch.float32).flops
    bf16 = measure_peak(device, torch.bfloat16, worth=fp32).flops
    compute, peak = ("bf16", bf16) if bf16 > _WORTH * fp32 else ("fp32", fp32)
    return Precision(
        compute, device.type, peak, f"{compute}: measured peak {_rate(bf16)} in bf16 and {_rate(fp32)} in fp32"
    )
