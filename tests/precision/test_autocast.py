from __future__ import annotations

from typing import Any

import pytest
import torch

from resilin.config import SettingsError, parse_settings
from resilin.precision import autocast as autocast_module
from resilin.precision.autocast import choose_precision
from resilin.precision.probe import Peak
from resilin.precision.settings import PrecisionSettings


def machine(patch: pytest.MonkeyPatch, fp32: float, bf16: float) -> list[torch.dtype]:
    measured: list[torch.dtype] = []

    def measure(device: Any, dtype: torch.dtype, **_: Any) -> Peak:
        measured.append(dtype)
        return Peak(bf16 if dtype == torch.bfloat16 else fp32, 1024, 0.1)

    patch.setattr(autocast_module, "measure_peak", measure)
    return measured


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"), [(180e9, 700e9, "bf16"), (100e9, 0.3e9, "fp32"), (100e9, 110e9, "fp32")]
)
def test_auto_takes_bf16_only_where_it_is_clearly_faster_and_says_why(
    monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float, chosen: str
) -> None:
    machine(monkeypatch, fp32, bf16)
    precision = choose_precision(PrecisionSettings(), "cpu")
    assert precision.compute == chosen
    assert precision.peak_flops == (bf16 if chosen == "bf16" else fp32)
    assert f"{bf16 / 1e9:.1f} GFLOP/s in bf16 and {fp32 / 1e9:.1f} GFLOP/s in fp32" in precision.reason


def test_a_hiccup_while_fp32_is_measured_does_not_choose_an_emulated_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1e6, 3e9, 75e9, 150e9])  # fp32 disturbed, bf16 emulated, fp32 again; then fp32 on all threads
    monkeypatch.setattr(autocast_module, "measure_peak", lambda *_, **__: Peak(next(rates), 64, 0.1))
    assert choose_precision(PrecisionSettings(), "cpu").compute == "fp32"


@pytest.mark.parametrize(("compute", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_what_is_set_is_taken_whatever_is_faster_and_only_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, compute: Any, dtype: torch.dtype
) -> None:
    measured = machine(monkeypatch, 1e9, 2e9)
    precision = choose_precision(PrecisionSettings(compute=compute), "cpu")
    assert precision.compute == compute
    assert set(measured) == {dtype}


@pytest.mark.parametrize(("compute", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_inside_the_context_have_the_chosen_format_and_masters_stay_float32(
    monkeypatch: pytest.MonkeyPatch, compute: Any, dtype: torch.dtype
) -> None:
    machine(monkeypatch, 1e9, 1e9)
    layer = torch.nn.Linear(3, 2)
    with choose_precision(PrecisionSettings(compute=compute), "cpu").autocast():
        out = layer(torch.ones(4, 3))
    out.float().sum().backward()
    assert out.dtype == dtype
    assert layer.weight.dtype == torch.float32
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_measuring_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    choose_precision(PrecisionSettings(), "cpu")
    assert torch.get_num_threads() == before


def test_settings_name_the_nearest_choice() -> None:
    with pytest.raises(SettingsError, match=r"compute.*did you mean 'bf16'"):
        parse_settings(PrecisionSettings, {"compute": "bf61"}, "x.toml")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_in_bf16_by_default_and_fp32_is_not_tf32_unless_asked() -> None:
    assert choose_precision(PrecisionSettings(), "cuda").compute == "bf16"
    assert torch.get_float32_matmul_precision() == "highest"
    choose_precision(PrecisionSettings(tf32=True), "cuda")
    assert torch.get_float32_matmul_precision() == "high"
    choose_precision(PrecisionSettings(), "cuda")
