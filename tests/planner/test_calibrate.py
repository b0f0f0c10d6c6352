"""Measurements become a description that reads back, and fits find what made the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from resilin.config import settings_to_toml
from resilin.models.decoder_settings import DecoderSettings
from resilin.planner.calibrate.blocks import Timed, _parts, _with, fit, least_squares, time_decoders
from resilin.planner.calibrate.compute import measure_compute, seconds_of
from resilin.planner.calibrate.disk import measure_disk
from resilin.planner.calibrate.links import Exchanged, measure_links
from resilin.planner.cost import Workload
from resilin.planner.hardware import load_cluster

LAPTOP = load_cluster("laptop")


def test_a_line_through_sums_gives_back_bandwidth_and_latency() -> None:
    for processes in (2, 4, 8):
        steps, share = 2 * (processes - 1), 2 * (processes - 1) / processes
        sums = {size: steps * 3e-5 + share * size / 2e9 for size in (1 << 12, 1 << 20, 1 << 24)}
        bandwidth, latency = Exchanged(processes, sums, {}).line()
        assert bandwidth == pytest.approx(2e9)
        assert latency == pytest.approx(3e-5)


def test_sums_of_noise_still_give_a_usable_line() -> None:
    bandwidth, latency = Exchanged(2, {1 << 12: 1.0, 1 << 20: 0.5, 1 << 24: 0.1}, {}).line()
    assert bandwidth > 0
    assert latency >= 0


def test_a_fit_finds_the_shares_that_made_the_times() -> None:
    made = _with(LAPTOP, 0.7, 0.4, 12e-6)
    timed = []
    for hidden, layers, rows, tokens in ((64, 4, 2, 32), (256, 2, 8, 64), (512, 2, 4, 128), (128, 6, 1, 16)):
        work = Workload(DecoderSettings(vocab_size=512, hidden_size=hidden, layers=layers, heads=4), tokens, rows)
        timed.append(Timed(work, rows, _parts(Timed(work, rows, 0.0), made).total))
    found = fit(timed, LAPTOP)
    told = [_parts(each, found).total for each in timed]
    assert told == pytest.approx([each.seconds for each in timed], rel=0.1)
    with pytest.raises(ValueError, match="2 passes"):
        fit(timed[:2], LAPTOP)


def test_no_factor_of_a_fit_is_negative() -> None:
    rows = np.array([[1.0, 0.1], [2.0, 0.1], [3.0, 0.1]])
    assert least_squares(rows, np.array([0.9, 1.9, 2.9])) == pytest.approx((0.964, 0.0), abs=0.02)
    assert least_squares(rows, rows @ np.array([2.0, 5.0])) == pytest.approx((2.0, 5.0))


def test_a_device_and_a_disk_are_measured(tmp_path: Path) -> None:
    found = measure_compute(torch.device("cpu"))
    assert set(found.peak()) == {"fp32", "bf16"}
    assert found.bandwidth > 1e8
    assert 0 < found.launch < 1e-2
    read, written = measure_disk(tmp_path, count=16 << 20, rounds=1)
    assert min(read, written) > 1e5
    assert not list(tmp_path.iterdir())


def test_a_short_call_is_repeated_and_a_long_one_is_not() -> None:
    calls = []
    taken = seconds_of(lambda: calls.append(1), lambda: None, least=0.002, rounds=2)
    assert len(calls) > 100
    assert taken < 1e-3


@pytest.mark.slow
def test_processes_measure_their_links_and_decoders_their_passes() -> None:
    found = measure_links(2, sizes=(1 << 12, 1 << 16))
    assert set(found.sums) == set(found.messages) == {1 << 12, 1 << 16}
    assert min(found.sums.values()) > 0
    timed = time_decoders(torch.device("cpu"), ((32, 1, 1, 8), (32, 2, 1, 8), (64, 1, 2, 8)))
    cluster = fit(timed, LAPTOP)
    assert settings_to_toml(cluster)
    assert 0 < cluster.efficiency.products <= 1
