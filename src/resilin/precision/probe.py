"""The matrix-product peak of this machine, measured in a fraction of a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

_SIZES = {"cpu": [64, 128, 256, 512, 1024, 2048], "cuda": [512, 2048, 4096, 8192]}
_TELLING = 128  # from this size on, a rate says what larger sizes will give
_HOPELESS = 5.0  # this many times slower than the rate to beat: no larger size is tried
_REPEATS = 3  # of which the fastest counts


@dataclass(frozen=True, slots=True)
class Peak:
    """The best rate found.

    Attributes:
        flops: floating-point operations per second, counting 2 n^3 for an n x n product.
        size: the n it was reached at.
        seconds: how long the measurement took.
    """

    flops: float
    size: int
    seconds: float


def _clock() -> float:
    return time.perf_counter()


@contextmanager
def one_thread() -> Iterator[None]:
    """CPU products use one thread inside: no waiting for another thread that the machine has not scheduled."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _operands(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)
    return a, torch.empty_like(a)


def _time_product(a: Tensor, out: Tensor) -> float:
    """Seconds of one product."""
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    begin = _clock()
    torch.mm(a, a, out=out)
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return _clock() - begin


def measure_peak(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    budget: float = 0.06,
    to_beat: float = 0.0,
    known: float = 0.0,
) -> Peak:
    """The best rate of square matrix products, over sizes that grow only while the budget allows.

    A format that the processor only emulates can be hundreds of times slower than float32 (a bfloat16 product of
    2048 x 2048 takes a minute on a CPU without bfloat16 units), so the search starts tiny, and a size is only
    tried when the rate of the last one says that it fits in what is left.

    Args:
        device: where to measure.
        dtype: of both factors and the product.
        budget: seconds, not counting the very first product, which loads kernels and starts threads.
        to_beat: FLOP/s; the search ends once a size stays five times below it.
        known: FLOP/s that the machine is known to reach: only the two largest sizes that fit at this rate are tried
            (on a busy machine, threads that wait for each other make small products very slow).
    """
    device = torch.device(device)
    sizes = _SIZES["cuda" if device.type == "cuda" else "cpu"]
    if known:
        sizes = [n for n in sizes if _REPEATS * 2.0 * n**3 / known <= budget][-2:] or sizes[:1]
    a, out = _operands(sizes[0], device, dtype)
    _time_product(a, out)
    began = _clock()
    best_rate, best_size = 0.0, 0
    for size in sizes:
        work = 2.0 * size**3
        left = budget - (_clock() - began)
        if best_rate and _REPEATS * work / max(best_rate, known) > left:
            break
        a, out = _operands(size, device, dtype)
        rate = work / max(min(_time_product(a, out) for _ in range(_REPEATS)), 1e-9)
        if rate > best_rate:
            best_rate, best_size = rate, size
        if size >= _TELLING and rate * _HOPELESS < to_beat:
            break
    return Peak(best_rate, best_size, _clock() - began)
