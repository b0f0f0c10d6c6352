"""What one process computes and moves: products by format and size, memory, and what an operation takes besides."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SIZES = (64, 256, 512, 1024)
"""Rows, columns and inner size of the products that are timed."""
_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Computed:
    """What was measured of one device.

    Attributes:
        products: FLOP/s by format and size.
        bandwidth: bytes a second, read and written together.
        launch: seconds of an operation on next to nothing.
    """

    products: dict[str, dict[int, float]]
    bandwidth: float
    launch: float

    def peak(self) -> dict[str, float]:
        """FLOP/s of the quickest size of each format."""
        return {name: max(rates.values()) for name, rates in self.products.items()}


def seconds_of(work: Callable[[], object], wait: Callable[[], None], *, least: float = 0.1, rounds: int = 5) -> float:
    """The median over rounds of one call, repeated until a round takes a tenth of a second."""
    work()
    wait()
    count, taken = 1, 0.0
    while True:
        began = time.perf_counter()
        for _ in range(count):
            work()
        wait()
        taken = time.perf_counter() - began
        if taken >= least / 2 or count > 1 << 20:
            break
        count *= 2
    found = [taken / count]
    for _ in range(rounds - 1):
        began = time.perf_counter()
        for _ in range(count):
            work()
        wait()
        found.append((time.perf_counter() - began) / count)
    return statistics.median(found)


def measure_compute(device: torch.device) -> Computed:
    """Times products, a large copy and a small addition on a device."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    scale = 8 if device.type == "cuda" else 1
    products: dict[str, dict[int, float]] = {}
    for name, dtype in _FORMATS.items():
        rates = {}
        for size in (scale * one for one in SIZES):
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            out = torch.empty(size, size, device=device, dtype=dtype)
            taken = seconds_of(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), wait)  # type: ignore[misc]
            rates[size] = 2 * size**3 / taken
        products[name] = rates
    source = torch.ones(_BYTES * scale // 4, device=device)
    target = torch.empty_like(source)
    copied = seconds_of(lambda: target.copy_(source), wait)
    small = torch.ones(16, device=device)
    launch = seconds_of(lambda: small.add_(1.0), wait, least=0.02)
    return Computed(products, 2 * source.nbytes / copied, launch)
