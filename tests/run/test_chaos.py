"""Blows: drawn, written down, and what they do to a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from elastic_runs import settings_of, text_at
from hypothesis import given
from hypothesis import strategies as st

from resilin.cluster.local import worker_command
from resilin.run.chaos import Blow, Told, blows_of, compare, drawn, run_chaos


@given(st.integers(0, 1 << 20), st.integers(3, 200), st.integers(0, 20))
def test_blows_are_drawn_from_a_seed_and_fall_while_there_is_a_step_to_come(seed: int, steps: int, count: int):
    blows = drawn(seed, steps, count, ("kill", "stop"))
    assert blows == drawn(seed, steps, count, ("kill", "stop"))
    assert len(blows) == count
    assert all(1 <= blow.step < steps and 0 <= blow.whom < 1 for blow in blows)
    assert [blow.step for blow in blows] == sorted(blow.step for blow in blows)


def test_a_difference_of_one_bit_and_a_step_that_is_missing_are_counted():
    quiet = Told(losses=[(1, 0.5, 1.0), (2, 0.25, 1.0)], digest=["a"])
    same = Told(losses=list(quiet.losses), digest=["a"])
    other = Told(losses=[(1, 0.5000000001, 1.0)], digest=["b"], blows=[(3.0, "kill", 1)], times=[2.0, 3.5])
    assert compare(quiet, same).good
    report = compare(quiet, other)
    assert (report.steps_lost, report.bits_changed, report.recovery, report.good) == (1, 3, [0.5], False)


def test_a_file_that_holds_no_blows_is_refused(tmp_path: Path):
    path = tmp_path / "chaos.json"
    for content in ("", "[]", '{"blows": [{"step": 1}]}', json.dumps({"blows": [[1, 2]]})):
        path.write_text(content)
        with pytest.raises(ValueError, match="no list of blows"):
            blows_of(path)
    path.write_text('{"blows": [{"step": 1, "after": 0, "what": "burn", "whom": 0}]}')
    with pytest.raises(ValueError, match="burn"):
        blows_of(path)


def test_a_run_under_blows_is_the_run_in_peace(tmp_path: Path):
    blows = [Blow(2, 0.01, "kill", 0.4), Blow(6, 0.0, "stop", 0.9, 0.2), Blow(9, 0.02, "drain", 0.0)]
    report, quiet, struck = run_chaos(settings_of(text_at(tmp_path)), tmp_path / "chaos", worker_command(), blows)
    assert report.good, report
    assert len(quiet.losses) == len(struck.losses) == 14
    assert quiet.evaluations == struck.evaluations != []
    assert blows_of(tmp_path / "chaos" / "chaos.json") == blows
    assert len(struck.blows) >= 1
