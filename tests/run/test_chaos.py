"""Blows: drawn, written down, and what they do to a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from elastic_checks import changes, check_same
from elastic_runs import settings_of, text_at
from hypothesis import given
from hypothesis import strategies as st

from resilin.cluster.isolation import can_isolate
from resilin.cluster.local import worker_command
from resilin.run.blows import KINDS, Blow, Fell, blows_of, drawn
from resilin.run.chaos import run_chaos, run_told
from resilin.run.chaos_report import Told, compare


@given(st.integers(0, 1 << 20), st.integers(3, 200), st.integers(0, 20))
def test_blows_are_drawn_from_a_seed_and_fall_while_there_is_a_step_to_come(seed: int, steps: int, count: int):
    blows = drawn(seed, steps, count, KINDS, many=2)
    assert blows == drawn(seed, steps, count, KINDS, many=2)
    assert len(blows) == count
    assert all(1 <= blow.step < steps and 0 <= blow.whom < 1 for blow in blows)
    assert [blow.step for blow in blows] == sorted(blow.step for blow in blows)
    assert all((blow.seconds > 0) == (blow.what in ("stop", "slow", "partition")) for blow in blows)
    assert all(blow.seconds < 10 for blow in blows if blow.what in ("stop", "slow"))  # never as long as `silence`


def test_a_difference_of_one_bit_and_a_step_that_is_missing_are_counted():
    quiet = Told(losses=[(1, 0.5, 1.0), (2, 0.25, 1.0)], digest=["a"])
    same = Told(losses=list(quiet.losses), digest=["a"])
    other = Told(losses=[(1, 0.5000000001, 1.0)], digest=["b"], blows=[Fell(3.0, "kill", (1,), 3.0)], times=[2.0, 3.5])
    assert compare(quiet, same).good
    report = compare(quiet, other)
    assert (report.steps_lost, report.bits_changed, report.good) == (1, 3, False)
    assert (report.blows, report.recovery) == ({"kill": 1}, {"kill": [0.5]})


def test_who_was_only_slow_must_not_be_given_up():
    blows = [Fell(3.0, "slow", (1,), 5.0), Fell(6.0, "partition", (0, 2), 9.0)]
    told = Told(blows=blows, lost=[(7.0, 0, "is cut off"), (7.0, 2, "is cut off")])
    assert compare(told, told).good
    told.lost = [(4.0, 1, "was not heard of"), (5.0, 2, "was not heard of"), (7.0, 0, "is cut off")]
    assert compare(told, told).falsely_lost == [(1, "was not heard of"), (2, "was not heard of")]


def test_each_blow_is_told_with_what_was_done_about_it():
    facts = {"redone": 0, "halting": 0.1, "adopting": 0.2, "why": "member 1 was killed", "members": [0, 2]}
    told = Told(
        times=[1.0, 1.5, 2.0, 3.0, 3.25, 3.5, 5.0, 5.5],
        changes=[{"time": 0.5, **facts}, {"time": 2.75, **facts}],
        blows=[Fell(2.1, "kill", (1,), 2.1), Fell(3.6, "stop", (0,), 4.5)],
    )
    first, second = compare(told, told).recoveries
    assert (first.step, first.seconds, first.before, first.after) == (3, pytest.approx(0.9), 2.0, 4.0)
    assert first.changes == (facts,)
    assert (second.seconds, second.before, second.after, second.changes) == (pytest.approx(1.4), 4.0, 2.0, ())
    assert compare(told, told).throughput == (3.0, 3.0)


def test_a_file_that_holds_no_blows_is_refused(tmp_path: Path):
    path = tmp_path / "chaos.json"
    for content in ("", "[]", '{"blows": [{"step": 1}]}', json.dumps({"blows": [[1, 2]]})):
        path.write_text(content)
        with pytest.raises(ValueError, match="no list of blows"):
            blows_of(path)
    path.write_text('{"blows": [{"step": 1, "after": 0, "what": "burn", "whom": 0}]}')
    with pytest.raises(ValueError, match="burn"):
        blows_of(path)
    path.write_text('{"blows": [{"step": 1, "after": 0, "what": "partition", "whom": 0, "side": "moon"}]}')
    with pytest.raises(ValueError, match="moon"):
        blows_of(path)


@pytest.mark.skipif(not can_isolate(), reason="packets are dropped by a filter of Linux")
@pytest.mark.parametrize(
    ("side", "ends", "why"),
    [
        ("members", True, "is cut off from member 0, 2"),
        pytest.param("all", False, "was not heard of", marks=pytest.mark.slow),
        pytest.param("members", False, "is cut off from member 0, 2", marks=pytest.mark.slow),
        pytest.param("coordinator", True, "", marks=pytest.mark.slow),  # its process ends, or its connection before it
    ],
)
def test_a_worker_that_is_cut_off_stops_and_the_others_go_on_with_the_same_bits(
    side: str, ends: bool, why: str, text: Path, undisturbed: Path, tmp_path: Path
):
    """Real sockets; with `silence` of 2 s the others wait so long, or twice that, where nothing tells them."""
    blow = Blow(4, 0.0, "partition", 0.4, seconds=60.0, side=side, ends=ends)
    told = run_told(settings_of(text, cluster={"silence": 2}), tmp_path / "run", worker_command(), [blow])
    assert told.ended == ""
    assert [(member, why in said) for _, member, said in told.lost] == [(1, True)], told.lost
    assert [change["members"] for change in changes(tmp_path / "run")] == [[0, 1, 2], [0, 2]]
    check_same(tmp_path / "run", undisturbed)
    if side != "members":  # nothing that the launcher did has reached it: it ended by itself
        assert "has lost its coordinator, and ends" in (tmp_path / "run/workers/worker-1.log").read_text()


@pytest.mark.slow
def test_a_worker_that_is_slow_is_waited_for(text: Path, undisturbed: Path, tmp_path: Path):
    blow = Blow(3, 0.0, "slow", 0.4, seconds=0.6, share=0.8)
    told = run_told(settings_of(text), tmp_path / "run", worker_command(), [blow])
    assert (told.ended, told.lost, [fell.what for fell in told.blows]) == ("", [], ["slow"])
    assert len(changes(tmp_path / "run")) == 1
    check_same(tmp_path / "run", undisturbed)


def test_a_run_under_blows_is_the_run_in_peace(tmp_path: Path):
    blows = [Blow(2, 0.01, "kill", 0.4), Blow(6, 0.0, "stop", 0.9, 0.2), Blow(9, 0.02, "drain", 0.0)]
    report, quiet, struck = run_chaos(settings_of(text_at(tmp_path)), tmp_path / "chaos", worker_command(), blows)
    assert report.good, report
    assert len(quiet.losses) == len(struck.losses) == 14
    assert quiet.evaluations == struck.evaluations != []
    assert blows_of(tmp_path / "chaos" / "chaos.json") == blows
    assert len(struck.blows) >= 1
    told = json.loads((tmp_path / "chaos" / "chaos.json").read_text())["report"]
    assert sum(told["blows"].values()) == len(struck.blows) == len(told["recoveries"])
    assert told["falsely_lost"] == []


@pytest.mark.slow
def test_a_run_of_teams_under_blows_is_the_run_in_peace(tmp_path: Path):
    blows = [
        Blow(2, 0.01, "kill", 0.4),
        Blow(6, 0.0, "stop", 0.9, 0.2),
        Blow(9, 0.0, "kill", 0.9),
        Blow(14, 0.0, "add", 0),
    ]
    settings = settings_of(text_at(tmp_path), parallel={"workers": 4, "tensor": 2}, train={"steps": 40})
    report, _, struck = run_chaos(settings, tmp_path / "chaos", worker_command(), blows)
    assert report.good, report
    assert {fell.what for fell in struck.blows} >= {"kill", "stop"}
    assert all(len(fell.members) == 2 for fell in struck.blows if fell.what == "add")
