"""Traces: files give back what was written, wrong ones are refused by line, drawn ones follow their laws and keys."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from failure_traces import DAY, traces
from hypothesis import given, settings

from resilin.planner.long_run.draw import (
    Evictions,
    Failures,
    MachineFailures,
    RackFailures,
    Stragglers,
    draw,
)
from resilin.planner.long_run.laws import Law
from resilin.planner.long_run.trace import COLUMNS, EVICT, FAIL, SLOW, Trace, TraceError

HEAD = "# resilin trace 1, 4 machines, 1000 seconds"


@given(traces())
@settings(max_examples=60, deadline=None)
def test_a_file_gives_back_the_trace(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    path = tmp_path_factory.mktemp("trace") / "failures.csv"
    trace.write(path)
    again = Trace.read(path)
    assert (again.machines, again.seconds) == (trace.machines, trace.seconds)
    for name in ("time_E", "kind_E", "machine_E", "until_E", "notice_E", "factor_E"):
        assert np.array_equal(getattr(again, name), getattr(trace, name)), name


@pytest.mark.parametrize(
    ("lines", "line", "said"),
    [
        ([], 1, "begins with"),
        (["# resilin trace 2, 4 machines, 10 seconds", COLUMNS], 1, "begins with"),
        ([HEAD, "time,event"], 2, COLUMNS),
        ([HEAD, COLUMNS, "1,fail,0,2,0"], 3, "six columns"),
        ([HEAD, COLUMNS, "1,fall,0,2,0,1"], 3, "'fall'"),
        ([HEAD, COLUMNS, "1,fail,-1,2,0,1"], 3, "'-1'"),
        ([HEAD, COLUMNS, "1,fail,0,later,0,1"], 3, "'later'"),
        ([HEAD, COLUMNS, "1,fail,0,nan,0,1"], 3, "'nan'"),
        ([HEAD, COLUMNS, "5,fail,0,6,0,1", "1,fail,0,2,0,1"], 4, "sort events"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, lines: list[str], line: int, said: str) -> None:
    path = tmp_path / "failures.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(TraceError, match=r"failures\.csv") as error:
        Trace.read(path)
    assert f":{line}:" in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("1,fail,4,2,0,1", "machines 0 to 3"),
        ("3,fail,0,2,0,1", "ends before it begins"),
        ("1001,fail,0,2000,0,1", "that are covered"),
        ("1,fail,0,2,30,1", "only an eviction"),
        ("1,evict,0,2,-3,1", "announced at no time"),
        ("1,slow,0,2,0,0.5", "factor below 1"),
        ("1,fail,0,2,0,2", "only a slow machine"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "failures.csv"
    path.write_text("\n".join([HEAD, COLUMNS, row]))
    with pytest.raises(TraceError, match=said):
        Trace.read(path)


def test_exponential_failures_are_as_many_as_their_rate_says() -> None:
    laws = Failures(machine=MachineFailures(mean_hours=240, repair=Law(law="fixed", mean_hours=0)))
    trace = draw(laws, 1000, 100 * DAY, seed=3)
    mean = 1000 * 100 * 24 / 240
    assert abs(len(trace) - mean) < 4 * math.sqrt(mean)  # a Poisson count
    counts = np.bincount(trace.machine_E, minlength=1000)
    assert abs(counts.var() / counts.mean() - 1) < 0.2
    assert laws.rate(1000) == pytest.approx(mean / (100 * DAY))


@pytest.mark.parametrize("law", ["exponential", "weibull"])
def test_laws_have_their_mean(law: str) -> None:
    uniform = (np.arange(100_000) + 0.5) / 100_000
    found = Law(law=law, mean_hours=5, shape=0.7).seconds(uniform)
    assert found.mean() == pytest.approx(5 * 3600, rel=0.01)
    assert (np.diff(found) < 0).all()


def test_what_is_repaired_fails_sooner_where_the_shape_is_below_one() -> None:
    def soon(shape: float) -> float:
        machine = MachineFailures(law="weibull", mean_hours=1000, shape=shape, repair=Law(mean_hours=0))
        return len(draw(Failures(machine=machine), 2000, 10 * DAY, seed=0))

    assert soon(0.6) > 1.5 * soon(1.0) > 3 * soon(2.0)


def test_more_machines_and_a_longer_time_change_nothing_of_what_was_there() -> None:
    laws = Failures(
        machine=MachineFailures(mean_hours=100), spot=Evictions(mean_hours=300), slow=Stragglers(mean_hours=50)
    )
    small, large = draw(laws, 20, 10 * DAY, seed=5), draw(laws, 50, 30 * DAY, seed=5)
    kept = (large.machine_E < 20) & (large.time_E < 10 * DAY)
    for name in ("time_E", "kind_E", "machine_E", "until_E", "notice_E", "factor_E"):
        assert np.array_equal(getattr(small, name), getattr(large, name)[kept]), name
    assert not np.array_equal(draw(laws, 20, 10 * DAY, seed=6).time_E[:5], small.time_E[:5])


def test_a_rack_fails_at_one_instant_and_only_its_machines() -> None:
    laws = Failures(rack=RackFailures(mean_hours=200, machines=6, repair=Law(law="fixed", mean_hours=1)))
    trace = draw(laws, 20, 60 * DAY, seed=1)  # the last rack has two machines
    assert len(trace) > 20
    for time in np.unique(trace.time_E):
        together = trace.machine_E[trace.time_E == time]
        rack = together[0] // 6
        assert together.tolist() == list(range(6 * rack, min(6 * rack + 6, 20)))


def test_kinds_carry_their_notice_and_factor() -> None:
    laws = Failures(
        machine=MachineFailures(mean_hours=500),
        spot=Evictions(mean_hours=500, notice_seconds=30),
        slow=Stragglers(mean_hours=500, factor=2.5),
    )
    trace = draw(laws, 50, 30 * DAY, seed=0)
    for kind, notice, factor in ((FAIL, 0, 1), (EVICT, 30, 1), (SLOW, 0, 2.5)):
        mine = trace.kind_E == kind
        assert mine.sum() > 10
        assert set(trace.notice_E[mine]) == {notice}
        assert set(trace.factor_E[mine]) == {factor}
