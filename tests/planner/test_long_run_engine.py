"""The engine: closed forms, every second accounted for, more harm is never a gain, and what was measured comes out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from failure_traces import DAY, traces
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.planner.budget import StepTimes
from resilin.planner.long_run import Course, Outcome, Trace, play
from resilin.planner.long_run.draw import Failures, MachineFailures, draw
from resilin.planner.long_run.engine import Diary
from resilin.planner.long_run.laws import Law
from resilin.planner.long_run.optimum import daly, expected, fewest, young
from resilin.planner.long_run.outcome import Bill
from resilin.planner.long_run.pace import MeasuredPaces
from resilin.planner.long_run.restart import Restart
from resilin.planner.long_run.rows import Dropping
from resilin.planner.long_run.stages import Habits, Sharing
from resilin.planner.long_run.way import Way

QUIET = Trace.of(4, 1e6, [])
EVEN = MeasuredPaces(StepTimes(((1.0, 4.0), (4.0, 1.0))))  # four members take a second, one takes four


def parts(outcome: Outcome) -> float:
    return outcome.useful + outcome.slower + outcome.again + outcome.saving + outcome.stopped + outcome.standing


def ways() -> dict[str, Way]:
    """Fresh ones, on four machines without stages."""
    return {
        "restart": Restart(4, 1, None, 1, 20.0, 5.0),
        "fewer": Restart(4, 1, EVEN, 1, 20.0, 5.0),
        "dropping": Dropping(4, 1, 3.0, 1.0, 1, 20.0),
        "spare": Dropping(4, 1, 3.0, 1.0, 1, 20.0, spare=1),
        "sharing": Sharing(4, 1, 1, EVEN, Habits(3.0, 3.0, restart=20.0)),
    }


NAMES = sorted(ways())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("interval", "saves"), [(math.inf, 0), (100.0, 9), (1000.0, 0), (99.0, 10), (3000.0, 0)])
def test_when_nothing_happens_a_run_takes_its_steps_and_its_checkpoints(name: str, interval: float, saves: int) -> None:
    way = ways()[name]
    outcome = play(way, QUIET, Course(1000, 1.0, interval, 7.0))
    work = 1000 / way.speed
    if name == "spare":  # three of four compute
        saves = max(math.ceil(work / interval) - 1, 0)
    assert outcome.finished
    assert outcome.seconds == pytest.approx(work + 7 * saves)
    assert outcome.useful == pytest.approx(1000)
    assert outcome.machine_seconds == pytest.approx(4 * outcome.seconds)


def test_restarts_take_what_dalys_formula_says() -> None:
    save, restart, apart = 60.0, 300.0, 4000.0
    laws = Failures(machine=MachineFailures(mean_hours=apart / 3600 * 4, repair=Law(law="fixed", mean_hours=0)))
    trace = draw(laws, 4, 700 * DAY, seed=11)
    for interval in (young(save, apart), daly(save, apart), 300.0, 3000.0):
        found = play(Restart(4, 1, None, 1, restart, save), trace, Course(1e7, 1.0, interval, save))
        assert found.finished
        assert found.losses > 3000
        # about 4000 independent failures: a standard error below 1 %
        assert found.seconds == pytest.approx(expected(1e7, interval, save, restart, apart), rel=0.03)


def test_optimal_intervals_are_near_where_the_expected_time_is_least() -> None:
    for save, apart in ((1.0, 1e5), (60.0, 4000.0), (600.0, 3000.0)):
        best = fewest(save, apart)
        least = expected(1.0, best, save, 0.0, apart)
        for factor in (0.9, 0.99, 1.01, 1.1):
            assert expected(1.0, best * factor, save, 0.0, apart) > least
        assert expected(1.0, daly(save, apart), save, 0.0, apart) < least * 1.001
        assert least <= expected(1.0, young(save, apart), save, 0.0, apart) < least * 1.2
    assert daly(10.0, 4.0) == 4.0
    assert daly(10.0, math.inf) == young(10.0, math.inf) == fewest(10.0, math.inf) == math.inf


@given(traces(), st.sampled_from(NAMES), st.sampled_from([math.inf, 90.0]), st.integers(100, 900))
@settings(max_examples=150, deadline=None)
def test_every_second_is_accounted_for(trace: Trace, name: str, interval: float, steps: int) -> None:
    outcome = play(ways()[name], trace, Course(steps, 1.0, interval, 7.0, limit=5000.0))
    assert parts(outcome) == pytest.approx(outcome.seconds, abs=1e-6)
    assert min(outcome.useful, outcome.slower, outcome.again, outcome.saving, outcome.stopped, outcome.standing) > -1e-9
    assert outcome.finished == (outcome.steps == steps)
    assert 0 <= outcome.goodput <= 1 + 1e-12
    assert outcome.machine_seconds <= trace.machines * outcome.seconds + 1e-6
    assert outcome == play(ways()[name], trace, Course(steps, 1.0, interval, 7.0, limit=5000.0))


@given(traces(slow=False), st.data())
@settings(max_examples=120, deadline=None)
def test_sharing_is_never_quicker_for_more_failures_or_longer_stops(trace: Trace, data: st.DataObject) -> None:
    def seconds(of: Trace, stop: float) -> float:
        way = Sharing(4, 1, 1, EVEN, Habits(stop, stop, copies=-1, moving=True, restart=0.0))
        outcome = play(way, of, Course(600, 1.0, limit=50_000.0))
        return outcome.seconds - 1e-6 if outcome.finished else math.inf

    kept = [at for at in range(len(trace)) if data.draw(st.booleans())]
    fewer = replace(trace, **{
        name: getattr(trace, name)[kept]
        for name in ("time_E", "kind_E", "machine_E", "until_E", "notice_E", "factor_E")
    })  # fmt: skip
    all_at_once = max((sum(a <= t < u for a, u in zip(trace.time_E, trace.until_E, strict=True)) for t in trace.time_E),
                      default=0)  # fmt: skip
    if all_at_once < 4:  # where nobody is left, all begins again: when that is decides what it costs
        # Each failure may break a step off, which one that falls into a stop that there is already does not.
        assert seconds(fewer, 3.0) <= seconds(trace, 3.0) + len(fewer) * 1.0 + 2e-6
        assert seconds(trace, 3.0) <= seconds(trace, 9.0) + len(trace) * 1.0 + 2e-6


def test_spare_machines_take_seats_and_those_that_come_back_wait() -> None:
    trace = Trace.of(6, 1e4, [(100, "fail", 0, 500, 0, 1), (200, "fail", 1, 1e4, 0, 1), (300, "fail", 2, 400, 0, 1)])
    way = Sharing(4, 1, 1, EVEN, Habits(0.0, 0.0))
    outcome = play(way, trace, Course(1000, 1.0), spares=2)
    # two are replaced at once; the third is missed for 100 seconds, in which three members share
    three = StepTimes(((1.0, 4.0), (4.0, 1.0)))(3.0)
    assert outcome.seconds == pytest.approx(900 + 100 + (100 - 100 / three))
    assert outcome.losses == 3
    assert outcome.machine_seconds == pytest.approx(6 * outcome.seconds - 400 - 100 - (outcome.seconds - 200))


def test_an_eviction_that_is_known_in_time_loses_nothing() -> None:
    def again(notice: float) -> float:
        trace = Trace.of(4, 1e4, [(150.5, "evict", 0, 160, notice, 1)])
        return play(Restart(4, 1, None, 1, 20.0, 5.0), trace, Course(1000, 1.0, 100.0, 5.0)).again

    assert again(30.0) == again(5.0) == 0
    assert again(4.0) == again(0.0) == pytest.approx(45.5)


def test_a_machine_that_fails_twice_is_there_when_both_are_over() -> None:
    trace = Trace.of(4, 1e4, [(10, "fail", 0, 500, 0, 1), (100, "fail", 0, 200, 0, 1)])
    outcome = play(Dropping(4, 1, 0.0, 0.0, 1, 0.0), trace, Course(1000, 1.0))
    assert outcome.slower == pytest.approx(490 / 4)
    assert outcome.losses == 1


def test_a_slow_machine_slows_all_and_only_while_it_is() -> None:
    trace = Trace.of(4, 1e4, [(10, "slow", 2, 110, 0, 2.0), (20, "slow", 3, 60, 0, 1.5)])
    for name in ("restart", "dropping", "sharing"):
        assert play(ways()[name], trace, Course(1000, 1.0)).seconds == pytest.approx(1050)


def test_a_diary_tells_what_the_outcome_counts() -> None:
    trace = Trace.of(4, 1e4, [(150, "fail", 0, 300, 0, 1), (550, "fail", 1, 600, 0, 1)])
    diary = Diary()
    outcome = play(Restart(4, 1, None, 1, 20.0, 5.0), trace, Course(1000, 1.0, 100.0, 5.0), diary=diary)
    assert diary.saves[:2] == pytest.approx([105, 425])
    assert diary.back == [(150, pytest.approx(105)), (550, pytest.approx(530))]
    assert outcome.again == pytest.approx(45 + 20)
    assert len(diary.saves) == round(outcome.saving / 5)


def test_cost_and_energy_are_those_of_machines_that_are_there() -> None:
    trace = Trace.of(4, 1e4, [(0, "evict", 3, 1e4, 0, 1)])
    outcome = play(Dropping(4, 1, 0.0, 0.0, 1, 0.0), trace, Course(750, 1.0))
    assert outcome.seconds == pytest.approx(1000)
    assert Bill(price=3.6, always=True).cost(outcome, 4) == pytest.approx(4.0)
    assert Bill(price=3.6, always=False).cost(outcome, 4) == pytest.approx(3.0)
    assert Bill(watts=300, idle=100).energy(outcome) == pytest.approx(3 * 1000 * 300 / 3.6e6)


def test_the_measured_run_with_kills_is_simulated_within_a_tenth() -> None:
    """`benchmarks/results/recovery.json`: 60 steps by four workers, of whom one is killed after 20 and one after 40."""
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "recovery.json"
    rows = json.loads(file.read_text())["rows"]
    whole = next(row for row in rows if "one killed after every 20 of 60 steps" in row["name"])
    beyond = next(row for row in rows if "what is more than one step" in row["name"])["runs"]["ours"]
    recovery = next(row for row in rows if "from a SIGKILL to the next step" in row["name"])["runs"]["ours"]
    before = whole["peer"] / 59
    after = sum(took - more for took, more in zip(recovery, beyond, strict=True)) / len(beyond)  # with two workers
    paces = MeasuredPaces(StepTimes(((2.0, after), (4.0, before))))
    way = Sharing(4, 1, 1, paces, Habits(sum(beyond) / len(beyond), 0.0))
    kills = [(19.2 * before, "fail", 1, math.inf, 0, 1), (40 * before, "fail", 2, math.inf, 0, 1)]
    found = play(way, Trace.of(4, 1e4, kills), Course(59, before))
    assert found.losses == 2
    assert found.seconds == pytest.approx(whole["ours"], rel=0.1)
