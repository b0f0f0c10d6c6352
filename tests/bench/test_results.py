"""Rows of benchmarks: what counts as met, what is written, and what is read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from resilin.bench.results import Report, Row, markdown_table, read_report, results_name
from resilin.cli.bench import app
from resilin.config import UserError


def test_a_row_takes_medians_and_a_ratio_that_is_better_when_larger() -> None:
    faster = Row.from_turns("steps", "s", [1.0, 9.0, 2.0], [4.0, 5.0, 3.0], "peer", better="lower", target=2.0)
    assert (faster.ours, faster.peer, faster.ratio, faster.met) == (2.0, 4.0, 2.0, True)
    slower = Row.from_turns("speed", "tokens/s", [1.0], [4.0], "peer", target=1.0)
    assert (slower.ratio, slower.met) == (0.25, False)
    assert Row(name="alone", unit="s", ours=1.0).met is None


def test_a_row_that_did_not_do_what_was_asked_is_missed_whatever_its_ratio() -> None:
    row = Row.from_turns("to accuracy", "s", [1.0], [9.0], "peer", better="lower", target=2.0, failed="never got there")
    assert row.ratio == 9.0
    assert row.met is False
    table = markdown_table([Report.of("trial", {}, [row])])
    assert "| 9.00x | 2x | no: never got there |" in table


def test_a_report_is_read_back_and_what_it_derives_is_not_believed(tmp_path: Path) -> None:
    row = Row.from_turns("speed", "tokens/s", [1.0, 3.0], [2.0], "peer", target=2.0, note="n")
    file = Report.of("trial", {"rounds": 2}, [row]).write(tmp_path)
    tree = json.loads(file.read_text())
    assert tree["rows"][0]["met"] is False
    tree["rows"][0] |= {"met": True, "ratio": 99.0}
    file.write_text(json.dumps(tree))
    found = read_report(file)
    assert found.rows[0].met is False
    assert found.rows[0].runs == {"ours": [1.0, 3.0], "peer": [2.0]}
    file.write_text("{}")
    with pytest.raises(UserError, match="not a benchmark's results"):
        read_report(file)


def on_a_gpu(report: Report) -> Report:
    machine = {"cpu": "A Processor", "cpu_capability": "AVX512", "cores": 16, "gpu": "A Card"}
    return report.model_copy(update={"benchmark": results_name(report.benchmark, "cuda"), "machine": machine})


def test_each_machine_has_a_table_of_its_own_that_says_what_it_is() -> None:
    here = Report.of("trial", {}, [Row(name="step", unit="ms", ours=4.0)])
    other = here.model_copy(update={"benchmark": "other"})
    parts = markdown_table([here, on_a_gpu(here), other]).split("Measured on ")
    assert parts[0] == ""
    assert len(parts) == 3
    for part, names, words in ((parts[1], {"trial", "other"}, ""), (parts[2], {"trial-cuda"}, "A Card, host A Proc")):
        assert part.startswith(words)
        rows = [line for line in part.splitlines() if line.startswith("| ") and "step" in line]
        assert {row.split(" | ")[0].removeprefix("| ") for row in rows} == names
        assert part.count("| benchmark |") == 1


def test_results_of_a_gpu_stand_beside_the_cpu_s_and_are_found_under_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "trial.py").write_text('"""What it measures."""\n')
    report = Report.of("trial", {}, [Row(name="step", unit="ms", ours=4.0)])
    runner, folder = CliRunner(), ["--folder", str(tmp_path)]
    assert "not measured here yet" in runner.invoke(app, ["list", *folder]).output
    on_a_gpu(report).write(tmp_path / "results")
    assert "(measured on cuda)" in runner.invoke(app, ["list", *folder]).output
    report.write(tmp_path / "results")
    assert "(measured on cpu and cuda)" in runner.invoke(app, ["list", *folder]).output
    shown = runner.invoke(app, ["show", "trial", *folder]).output
    assert "| trial | step" in shown
    assert "| trial-cuda | step" in shown
