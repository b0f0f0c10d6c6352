"""The evaluation suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resilin.posttrain.suite import TULU3, Evaluation, Suite, SuiteError

DEV = [line.name for line in TULU3 if line.part == "dev"]
UNSEEN = [line.name for line in TULU3 if line.part == "unseen"]
# The published numbers of the 8B models, in the suite's order.
SFT_8B = [65.9, 29.3, 46.8, 67.9, 61.3, 31.5, 76.2, 86.2, 81.4, 72.8, 12.4, 93.1]
FINAL_8B = [68.2, 29.1, 55.0, 66.0, 62.6, 43.7, 87.6, 83.9, 79.2, 82.4, 34.5, 85.5]


def results(values: list[float]) -> dict[str, Any]:
    return dict(zip(DEV, values, strict=True))


def test_the_average_is_that_of_the_published_table() -> None:
    suite = Suite()
    assert round(suite.report("SFT", results(SFT_8B)).average, 1) == 60.4
    assert round(suite.report("final", results(FINAL_8B)).average, 1) == 64.8


def test_skills_are_means_of_their_evaluations_and_changes_are_shown() -> None:
    suite = Suite()
    before, after = suite.report("SFT", results(SFT_8B)), suite.report("final", results(FINAL_8B))
    assert after.skills["mathematics"] == pytest.approx((43.7 + 87.6) / 2)
    text = after.text(before)
    assert "skill: safety" in text
    assert "  -7.6" in next(line for line in text.splitlines() if "skill: safety" in line)
    assert " +4.4" in next(line for line in text.splitlines() if "average" in line)


def test_a_mean_of_tasks_takes_exactly_its_tasks() -> None:
    safety = next(line for line in TULU3 if line.name == "Safety")
    assert len(safety.tasks) == 6
    tasks = dict(zip(safety.tasks, [90.0, 80.0, 70.0, 60.0, 50.0, 100.0], strict=True))
    report = Suite().report("m", {**results(SFT_8B), "Safety": tasks})
    assert report.scores["Safety"] == 75.0
    tasks.pop("HarmBench")
    with pytest.raises(SuiteError, match=r"Safety is the mean of .* unknown: HarmBench"):
        Suite().report("m", {**results(SFT_8B), "Safety": tasks})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"GSM8k": 5.0}, "'GSM8k' is no dev evaluation of this suite; did you mean 'GSM8K'"),
        ({"GPQA": 5.0}, "'GPQA' is no dev evaluation"),
        ({"GSM8K": "high"}, "GSM8K: the result should be a number from 0 to 100, not 'high'"),
        ({"GSM8K": 101.0}, "GSM8K: the result 101.0 is not between"),
        ({"GSM8K": float("nan")}, "should be a number"),
        ({"GSM8K": True}, "should be a number"),
    ],
)
def test_results_that_do_not_fit_are_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        Suite().report("m", {**results(SFT_8B), **change})


def test_a_missing_result_is_told() -> None:
    with pytest.raises(SuiteError, match="no result for: MMLU, PopQA"):
        Suite().report("m", dict.fromkeys(DEV[2:], 1.0))


def test_the_unseen_part_is_looked_at_once(tmp_path: Path) -> None:
    suite, folder = Suite(), tmp_path / "work"
    seen = dict.fromkeys(UNSEEN, 40.0)
    first = suite.look(folder, "final", seen)
    assert first.average == 40.0
    assert json.loads((folder / "unseen.json").read_text())["report"]["model"] == "final"
    assert suite.look(folder, "final", seen) == first
    for model, again in (("better", seen), ("final", {**seen, "GPQA": 41.0})):
        with pytest.raises(
            SuiteError, match=r"unseen\.json: the unseen evaluations were looked at on 20.*, of 'final'"
        ):
            suite.look(folder, model, again)
    suite.look(tmp_path / "other work", "better", seen)
    (folder / "unseen.json").write_text("{}")
    with pytest.raises(SuiteError, match="cannot be read"):
        suite.look(folder, "final", seen)


def test_one_s_own_suite_is_a_table() -> None:
    suite = Suite(
        evaluations=(Evaluation(name="addition", skill="mathematics"), Evaluation(name="copying", skill="control"))
    )
    assert suite.report("m", {"addition": 90, "copying": 50}).skills == {"mathematics": 90.0, "control": 50.0}
    with pytest.raises(SuiteError, match="unseen has no evaluations"):
        suite.report("m", {}, "unseen")
    with pytest.raises(ValueError, match="twice: a"):
        Suite(evaluations=(Evaluation(name="a", skill="x"), Evaluation(name="a", skill="y")))
