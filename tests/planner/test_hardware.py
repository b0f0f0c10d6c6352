"""Descriptions of machines are read strictly, and those that come along hold together."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilin.config import UserError, settings_to_toml
from resilin.planner.hardware import Cluster, known_machines, load_cluster


@pytest.mark.parametrize("name", known_machines())
def test_a_known_machine_reads_and_is_written_back_the_same(name: str, tmp_path: Path) -> None:
    cluster = load_cluster(name)
    assert cluster.sources, "numbers without a source"
    path = tmp_path / "again.toml"
    path.write_text(settings_to_toml(cluster), encoding="utf-8")
    assert load_cluster(path) == cluster


def test_the_machines_of_the_papers_come_along() -> None:
    assert {"dgx-a100-40", "dgx-a100-80", "frontier", "dgx-h100", "laptop"} <= set(known_machines())


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = known_machines()["laptop"].read_text(encoding="utf-8").replace("launch =", "lauch =")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"device\.lauch: unknown key 'lauch'; did you mean 'launch'"):
        load_cluster(path)


def test_an_unknown_machine_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean 'dgx-a100-80'"):
        load_cluster("dgx-a100-8")


def test_an_override_is_laid_over_the_file_and_checked() -> None:
    assert load_cluster("dgx-h100", ["price.device_hour=2"]).cost(8, 1800) == 8.0
    with pytest.raises(UserError, match=r"price\.device_hour"):
        load_cluster("dgx-h100", ["price.device_hour=-2"])


def test_levels_have_to_grow() -> None:
    with pytest.raises(UserError, match="multiple of the 8"):
        load_cluster("dgx-h100", ['levels=[{name="a", devices=8, bandwidth=1}, {name="b", devices=12, bandwidth=1}]'])


def test_rates_and_costs_are_in_proportion_to_devices() -> None:
    cluster = load_cluster("dgx-a100-80")
    one = cluster.failure_rate(1)
    assert one is not None
    assert cluster.failure_rate(64) == pytest.approx(64 * one)
    assert one == pytest.approx(1 / (13600 * 3600))
    assert cluster.energy(2, 10.0) == pytest.approx(2 * 10 * 812)
    assert cluster.node == 8


def test_a_format_without_a_peak_is_told() -> None:
    with pytest.raises(UserError, match=r"no peak for fp8.*device\.peak\.fp8"):
        load_cluster("dgx-a100-80").peak("fp8")


def test_what_the_file_does_not_say_is_none() -> None:
    cluster = load_cluster("frontier")
    assert isinstance(cluster, Cluster)
    assert cluster.cost(8, 3600) is None
    assert cluster.failure_rate(8) is None
