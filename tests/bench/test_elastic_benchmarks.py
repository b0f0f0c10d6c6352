"""Benchmarks of elastic runs, in their quick forms: that they measure, and what they must find whatever the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from resilin.bench.results import Report, read_report

ROOT = Path(__file__).parents[2]


def quick(name: str, folder: Path) -> Report:
    command = [sys.executable, "-m", "resilin", "bench", "run", name, "--quick", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_report(folder / f"{name}.json")


def test_groups_are_edited_and_rebuilt_and_work_each_time(tmp_path: Path):
    """Every contender has to add up a number over its new groups, so that a time is one of groups that work."""
    report = quick("edit", tmp_path)
    assert report.settings["processes"] == [2, 3]
    assert [row.peer_name for row in report.rows] == [
        "full rebuild of torch's groups", "partial rebuild of torch's groups", "the aim",
    ] * 2  # fmt: skip
    assert all(row.ours > 0 and all(row.runs.values()) for row in report.rows)


@pytest.mark.slow
def test_nobody_is_given_up_while_the_machine_is_overloaded(tmp_path: Path):
    report = quick("overload", tmp_path)
    assert report.settings["seconds"] == 20.0
    assert (report.rows[0].unit, report.rows[0].ours) == ("workers", 0.0), report.rows[0].note
    assert report.rows[1].ours > 0
