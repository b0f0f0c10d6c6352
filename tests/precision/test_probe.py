from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resilin.precision import probe
from resilin.precision.probe import measure_peak


class Machine:
    """A simulated machine: a product takes an overhead and 2 n^3 / rate seconds of its own clock."""

    def __init__(self, patch: pytest.MonkeyPatch, rate: float, overhead: float = 0.0, first: float = 0.0) -> None:
        self.now, self.rate, self.overhead, self.first = 0.0, rate, overhead, first
        self.sizes: list[int] = []
        patch.setattr(probe, "_clock", lambda: self.now)
        patch.setattr(probe, "_time_product", self.product)

    def product(self, a: Tensor, out: Tensor) -> float:
        seconds = self.overhead + 2.0 * len(a) ** 3 / self.rate + (self.first if not self.sizes else 0.0)
        self.sizes.append(len(a))
        self.now += seconds
        return seconds


@settings(deadline=None, max_examples=40)
@given(rate=st.floats(8.3, 12.5).map(lambda e: 10**e), overhead=st.floats(0, 1e-4), first=st.floats(0, 0.2))
def test_the_measurement_stays_within_its_budget_on_any_machine(rate: float, overhead: float, first: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Machine(patch, rate, overhead, first)
        peak = measure_peak("cpu", torch.float32, budget=0.12)
        assert peak.seconds <= 0.12
        assert 0 < peak.flops <= rate * (1 + 1e-9)


def test_a_fast_machine_is_measured_on_large_products(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 700e9, overhead=2e-5, first=0.01)
    peak = measure_peak("cpu", torch.bfloat16)
    assert peak.size >= 1024
    assert peak.flops == pytest.approx(700e9, rel=0.05)


def test_an_emulated_format_is_given_up_after_tiny_products(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 0.3e9)
    peak = measure_peak("cpu", torch.bfloat16, to_beat=100e9)
    assert max(machine.sizes) == 128
    assert peak.seconds < 0.1
    assert peak.flops == pytest.approx(0.3e9)


def test_threads_that_stumble_over_each_other_on_small_products_do_not_end_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Machine(monkeypatch, 100e9, overhead=0.005)  # 5 ms of waiting, whatever the size
    assert measure_peak("cpu", torch.float32, budget=0.12).flops < 1e9
    Machine(monkeypatch, 100e9, overhead=0.005)
    assert measure_peak("cpu", torch.float32, budget=0.12, known=50e9).flops > 20e9


def test_this_machine_s_peak_is_believable() -> None:
    with probe.one_thread():
        peak = measure_peak("cpu", torch.float32)
    assert 1e8 < peak.flops < 1e14


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_s_bf16_peak_is_above_its_float32_peak() -> None:
    assert measure_peak("cuda", torch.bfloat16).flops > measure_peak("cuda", torch.float32).flops
