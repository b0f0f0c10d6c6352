"""`resilin layout schedule` as a user calls it, and as its page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from resilin.cli.main import app
from resilin.config import UserError
from resilin.parallel.pipeline import METHODS, Schedule, Timeline, build, simulate

PAGE = Path(__file__).parents[2] / "docs" / "pipeline.md"


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["layout", "schedule", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_a_schedule_is_drawn_and_written_and_read_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    order, times, picture = tmp_path / "order.csv", tmp_path / "times.csv", tmp_path / "deep" / "one.svg"
    said = call("1f1b", "--ranks", 2, "--micros", 3, "--csv", order, "--times", times, "--picture", picture)
    assert "1f1b: 2 stages on 2 ranks, 3 micro-batches\nrank 0 |F0─F1─······B0────F2─B1────···B2────|" in said
    assert "rank 1: computes 9, idle 3 (pauses 0), holds the activations of 1 F" in said
    assert "time 12, bubble 33.33% (1/3) of the computing time" in said
    assert picture.exists()
    assert Schedule.parse(order.read_text()).actions == build("1f1b", 2, 2, 3).actions
    assert Timeline.parse(times.read_text()).makespan == simulate(build("1f1b", 2, 2, 3)).makespan
    assert call(order).splitlines()[1:] == said.splitlines()[1:]
    measured = call("--measured", times)
    assert "rank 1: computes 9, idle 3 (pauses 0)\n" in measured


def test_times_are_those_of_a_whole_rank() -> None:
    took = ["--forward", "2", "--input-gradient", "3", "--weight-gradient", "1"]
    assert "time 36, bubble 50.00% (1/2)" in call("1f1b", "--ranks", 3, "--micros", 4, *took)
    assert "time 15, bubble 25.00% (1/4)" in call("interleaved", "--ranks", 3, "--micros", 4)
    assert "time 14," in call("gpipe", "--ranks", 2, "--micros", 3, "--transfer", "1")


def test_without_a_name_all_are_compared() -> None:
    said = call("--ranks", 3, "--micros", 6)
    assert [line.split()[0] for line in said.splitlines()] == ["schedule", *METHODS]


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    broken = tmp_path / "broken.csv"
    broken.write_text("0F0,0B0\n1B0,1F0\n")
    for arguments, message in (
        (["3f3b"], "no pipeline schedule '3f3b'"),
        ([broken], "rank 1: 1B0 comes before 1F0"),
        ([tmp_path / "no.csv"], "cannot read .*No such file"),
        (["1f1b", "--measured", broken], "either the schedule 1f1b or the times of"),
        (["--measured", broken], "line 1: .* is no rank,action,start,end"),
        (["1f1b", "--forward", "quick"], "'quick' is no time: write 2, 0.5 or 1/3"),
        (["1f1b", "--forward", "-1"], "a time cannot be negative: -1"),
        (["--transfer", "1"], "a comparison has neither groups nor transfers"),
        (["--csv", broken], "only a single schedule can be written with --csv"),
        (["--times", broken], "only the times of a single schedule"),
    ):
        with pytest.raises(UserError, match=message):
            call(*arguments)


def test_the_page_shows_what_its_commands_say_and_every_schedule() -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"```bash\nresilin layout schedule(.*)\n```\n```\n((?s:.*?))```", page)
    assert len(shown) >= 2
    for arguments, output in shown:
        assert call(*arguments.split()) == output
    for name in METHODS:
        assert f"`{name}`" in page
        assert f"(pictures/pipeline-{name}.svg)" in page
        assert (PAGE.parent / "pictures" / f"pipeline-{name}.svg").exists()
