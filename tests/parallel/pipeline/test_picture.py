"""Timelines drawn: every action where and as long as it ran."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_strategies import schedules

from resilin.parallel.pipeline import (
    METHODS,
    Action,
    Costs,
    Kind,
    Record,
    Schedule,
    ScheduleError,
    Timeline,
    build,
    peak_in_flight,
    simulate,
)
from resilin.parallel.pipeline.picture import draw, gantt
from resilin.parallel.pipeline.published import FORMULAS, Setting, compare, cost, table


@given(schedules(most_ranks=4, most_micros=5), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_the_drawing_can_be_read_back(schedule: Schedule, forward: int, weight: int) -> None:
    timeline = simulate(schedule, Costs(forward, 2, weight))
    lines = gantt(timeline, columns=100_000).splitlines()
    each = Fraction(len(lines[0].split("|")[1])) / timeline.makespan
    read = {}
    for rank, line in enumerate(lines):
        for found in re.finditer(r"(\d*)([FBIW])(\d+)─+", line.split("|")[1]):
            action = Action(Kind(found[2]), int(found[1] or rank), int(found[3]))
            read[action] = rank, found.start(), found.end()
    assert len(read) == len(timeline.records)
    for record in timeline.records:
        rank, first, end = read[record.action]
        assert rank == record.rank
        assert abs(first - record.start * each) <= 1
        assert abs(end - record.end * each) <= 1


def test_a_drawing_that_is_too_wide_shows_kinds_alone() -> None:
    timeline = simulate(build("zb-v", 4, 2, 3), Costs(1, 1, 1))
    assert gantt(timeline, columns=19) == "rank 0 |FFFfiwfiwIWfiwIWIW·|\nrank 1 |·FfFfiwFIWfiwIiIWwW|"


def test_measured_times_are_drawn_from_their_own_start() -> None:
    records = [Record(Action(Kind.F, 0, 0), 0, 1000.25, 1000.5), Record(Action(Kind.B, 0, 0), 0, 1000.75, 1001.25)]
    assert gantt(Timeline.of(records)) == "rank 0 |F0─···B0────|"


def test_times_are_written_and_read_exactly() -> None:
    timeline = Timeline.of(simulate(build("zb-h1", 2, 2, 2), Costs(Fraction(1, 3), 1, 2)).records)
    assert timeline.text().splitlines()[:2] == ["rank,action,start,end", "0,0F0,0,1/3"]
    assert Timeline.parse(timeline.text()) == timeline
    floats = Timeline.of([Record(Action(Kind.F, 0, 0), 0, 0.1, 1e-3 + 0.2)])
    assert Timeline.parse(floats.text()) == floats
    for wrong in ("0,0F0,1", "0,0F0,a,2", "x,0F0,1,2", "0,0F,1,2", "0,0F0,1,2/0"):
        with pytest.raises(ScheduleError, match=r"line 2: .* is no rank,action,start,end"):
            Timeline.parse("rank,action,start,end\n" + wrong)


def test_a_picture_has_a_box_and_a_name_for_each_action_and_is_the_same_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    schedule = build("zb-h1", 2, 2, 2)
    for name in ("one.svg", "two.svg"):
        draw([("zb-h1", simulate(schedule))], tmp_path / name, unit="ms")
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    for row in schedule.actions:
        for action in row:
            assert text.count(f">{action.kind.value}{action.micro}</text>") == 2  # once on each rank
    assert "time (ms)" in text
    with pytest.raises(ScheduleError, match="0 actions cannot be drawn"):
        draw([], tmp_path / "none.svg")


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 20), st.tuples(*[st.integers(1, 4).map(Fraction)] * 3))
@settings(max_examples=60, deadline=None)
def test_published_formulas_are_what_is_simulated(
    p: int, v: int, m: int, took: tuple[Fraction, Fraction, Fraction]
) -> None:
    for one in compare(Setting(p, v, m, *took)):
        if one.published_bubble is not None:
            assert one.bubble == one.published_bubble
        if one.published_held is not None:
            assert one.held == one.published_held


def test_formulas_are_given_where_they_hold() -> None:
    assert set(FORMULAS) <= set(METHODS)
    common = Setting(4, 2, 16)
    given = {one.name: (one.published_bubble, one.published_held) for one in compare(common)}
    assert given == {
        "gpipe": (Fraction(3, 16), 16),
        "1f1b": (Fraction(3, 16), 4),
        "interleaved": (Fraction(3, 32), Fraction(11, 2)),
        "zb-h1": (Fraction(1, 16), 4),
        "zb-interleaved": (None, None),
        "zb-v": (None, 4),
    }
    assert cost("zb-h1", Setting(4, 1, 16, weight=Fraction(2))).published_bubble is None
    assert cost("interleaved", Setting(4, 2, 3)).published_bubble is None
    schedule = build("zb-v", 8, 4, 16)
    assert max(peak_in_flight(schedule)) == 8


def test_the_table_is_simulated_beside_published() -> None:
    lines = table(compare(Setting(4, 2, 8))).splitlines()
    assert lines[0].split("  ")[0] == "schedule"
    assert lines[3].split() == ["interleaved", "2", "28.5", "18.75%", "18.75%", "4.5", "5.5", "5.5"]
