"""The matrix-product peak of this machine, measured in a fraction of a second."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

_SIZES = {"cpu": (64, 128, 256, 512, 1024), "cuda": (256, 1024, 4096, 8192)}


@dataclass(frozen=True, slots=True)
class Peak:
    """The best rate found.

    Attributes:
        flops: floating-point operations per second (2 n^3 of an n x n product).
        size: the n it was reached at.
        seconds: how long the measurement took.
    """

    flops: float
    size: int
    seconds: float


def _time_once(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    if a.device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(a, b, out=out)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    torch.mm(a, b, out=out)
    return time.perf_counter() - begin


def measure_peak(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    budget: float = 0.15,
    worth: float = 0.0,
) -> Peak:
    """The best rate of square products in `dtype`, growing the size only while the budget allows.

    A format the machine only emulates is thousands of times slower, so the search starts with a tiny product and
    stops as soon as the next larger one would not fit in the budget, or the rate is hopeless.

    Args:
        device: where to measure.
        dtype: of both factors.
        budget: seconds.
        worth: stop early once a size's rate is below a fifth of this rate (FLOP/s).
    """
    device = torch.device(device)
    began = time.perf_counter()
    best = Peak(0.0, 0, 0.0)
    for size in _SIZES["cuda" if device.type == "cuda" else "cpu"]:
        work = 2.0 * size**3
        if best.flops and work / best.flops > (budget - (time.perf_counter() - began)) / 2:
            break
        a = torch.full((size, size), 0.5, device=device, dtype=dtype)
        out = torch.empty_like(a)
        first = _time_once(a, a, out)  # also loads kernels
        repeats = 4 if first * 5 < budget - (time.perf_counter() - began) else 1
        seconds = min([_time_once(a, a, out) for _ in range(repeats)] + [first])
        if work / seconds > best.flops:
            best = Peak(work / seconds, size, 0.0)
        if work / seconds < worth / 5 and size >= 128:
            break
    return Peak(best.flops, best.size, time.perf_counter() - began)
