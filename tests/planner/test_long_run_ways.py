"""Ways to go on: those of the runtime are the runtime's, and the others do what their systems are known to do."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.cluster.axes import ASSIGNMENTS, Assignment, Clocks, Layers, Machine, Pipeline, Rules, decide
from resilin.cluster.axes.policies import ALL, GRAPH, INTACT, RESHAPE, WHOLE, policies
from resilin.cluster.changes import changed, first_view, moved
from resilin.parallel.pipeline import Split
from resilin.planner.long_run import Course, Trace, play
from resilin.planner.long_run.pace import CUT, Job, Pace, ScheduledPaces
from resilin.planner.long_run.restart import Restart
from resilin.planner.long_run.rows import Rows
from resilin.planner.long_run.stages import Habits, Sharing
from resilin.planner.long_run.templates import Reshaping, Templates

FREE = Habits(0.0, 0.0, copies=-1)


class Counted:
    """Paces by rule: a step takes as long as the stage with the fewest members needs; counts what it is asked."""

    def of(self, members: tuple[int, ...], slow: tuple[float, ...]) -> Pace | None:
        return Pace(max(factor / count for count, factor in zip(members, slow, strict=True))) if min(members) else None

    def level(self, members: int) -> int:
        return members

    def move(self, before: Split | None, after: Split | None, members: tuple[int, ...]) -> float:
        return 0.0


@pytest.mark.parametrize("stage", [0, 3])
def test_after_one_loss_axes_are_as_quick_as_the_planner_of_changes_says(stage: int) -> None:
    clocks = Clocks((Fraction(9, 10), Fraction(1), Fraction(11, 10), Fraction(6, 5)), Fraction(1), Fraction(1, 5))
    job = Job(Layers((1.0,) * 16), 4, 4, 4, 3, Machine(clocks=clocks))
    now = Pipeline.of(job.split, [list(range(4 * p, 4 * p + 4)) for p in range(4)], 16, 3)
    told = {one.name: one.seconds for one in policies(now, {stage: [3]}, job.layers, job.machine)}
    ways: dict[str, tuple[tuple[Assignment, ...], bool, bool]] = {
        WHOLE: (("whole",), False, False),
        RESHAPE: (CUT, False, False),
        GRAPH: (CUT, True, False),
        ALL: (ASSIGNMENTS, True, True),
    }
    for name, (assignments, graph, clock) in ways.items():
        way = Sharing(16, 4, 1, ScheduledPaces(job, assignments, graph, clock), FREE)
        way.lose([4 * stage + 3], 0.0)
        assert way.speed == pytest.approx(float(told[INTACT] / told[name])), name
        seat, _ = way.come()
        assert seat == 4 * stage + 3
        assert way.speed == pytest.approx(1.0)


@pytest.mark.parametrize(("assignments", "within"), [(CUT, 0.1), (("whole",), 0.15)])
def test_a_slice_is_near_what_replaying_all_members_says(assignments: tuple[Assignment, ...], within: float) -> None:
    for stages, replicas, ticks in ((2, 4, 4), (4, 8, 8)):
        job = Job(Layers((1.0,) * (8 * stages)), stages, replicas, ticks, 4)
        paces = ScheduledPaces(job, assignments, graph=False)
        paces._small = lambda slow: False  # type: ignore[method-assign]
        for lost in itertools.islice(itertools.product((0, 1), repeat=stages), 1, 4):
            members = tuple(replicas - count for count in lost)
            numbers = [[100 * stage + one for one in range(count)] for stage, count in enumerate(members)]
            full = [[100 * stage + one for one in range(replicas)] for stage in range(stages)]
            now = Pipeline.of(job.split, full, job.micros, job.micro)
            told = decide(now, numbers, job.layers, rules=Rules(assignments=assignments, graph=False))
            pace = paces.of(members, (1.0,) * stages)
            assert pace is not None
            assert pace.seconds == pytest.approx(float(told.after.seconds), rel=within)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_members_are_counted_as_the_runtime_places_them(data: st.DataObject) -> None:
    """Losses and newcomers in any order: stages have as many members as `changed` and `moved` give them."""
    stages, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    way = Sharing(stages * width, stages, 1, Counted(), Habits(0.0, 0.0, copies=-1, moving=True))
    view = first_view(list(range(stages * width)), dict.fromkeys(range(stages * width), "host"), stages)
    place = {seat: seat for seat in range(stages * width)}  # seat -> member
    new, empty = stages * width, 0
    for _ in range(data.draw(st.integers(1, 12))):
        if empty and data.draw(st.booleans()):
            seat, _ = way.come()
            view = changed(view, come={new: "host"})
            place[seat], new, empty = new, new + 1, empty - 1
        elif len(place) > stages:
            seat = data.draw(st.sampled_from(sorted(place)))
            stage = way._stage_of[seat]
            way.lose([seat], 0.0)
            # members of one stage are alike: the view loses any of the same one
            view = changed(view, gone=[view.stages[stage].members[0]])
            del place[seat]
            empty += 1
        else:
            continue
        better, now = moved(view), min(len(stage.members) for stage in view.stages)
        if (1 - now / min(len(stage.members) for stage in better.stages)) * 50 > 1:
            view = better
        assert way.machines == tuple(len(stage.members) for stage in view.stages)


@pytest.mark.parametrize(("lost", "copies", "restarts"), [
    ([0], 1, 0), ([0, 1], 1, 1), ([0, 2], 1, 0), ([3, 0], 1, 1), ([0, 1], 2, 0), ([0, 1, 2], 2, 1), ([3, 4], 1, 0),
])  # fmt: skip
def test_states_are_lost_with_all_who_hold_them(lost: list[int], copies: int, restarts: int) -> None:
    """Four machines of each of two stages: a machine's states are at the next ones of its own stage."""
    way = Sharing(8, 2, 1, Counted(), Habits(1.0, 1.0, copies=copies, restart=50.0))
    trace = Trace.of(8, 1e4, [(200.0, "fail", machine, 1e4, 0, 1) for machine in lost])
    outcome = play(way, trace, Course(1000, 1.0, 90.0, 0.0))
    assert outcome.restarts == restarts
    assert outcome.stopped == (50 if restarts else 1)
    assert outcome.again == pytest.approx(20 if restarts else 0)


def test_without_moving_members_a_stage_that_nobody_is_left_of_stops_the_run() -> None:
    trace = Trace.of(4, 1e5, [(100.0, "fail", 0, 500, 0, 1), (200.0, "fail", 1, 700, 0, 1)])
    stays = play(Sharing(4, 2, 1, Counted(), Habits(0.0, 0.0, restart=50.0)), trace, Course(5000, 1.0, 90.0, 0.0))
    moves_ = play(
        Sharing(4, 2, 1, Counted(), Habits(0.0, 0.0, moving=True, restart=50.0)), trace, Course(5000, 1.0, 90.0, 0.0)
    )
    assert stays.standing == pytest.approx(300)
    assert stays.restarts == 1
    assert moves_.standing == 0


@given(st.lists(st.integers(0, 11), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_rows_are_whole_where_no_seat_is_empty(seats: list[int]) -> None:
    rows, empty = Rows(12, 3), set()
    for seat in seats:
        if seat in empty:
            missing = {row: sum(one % 4 == row for one in empty) for row in range(4)}
            taken, whole = rows.take()
            assert taken in empty
            assert missing[taken % 4] == min(count for count in missing.values() if count)
            empty.remove(taken)
            assert whole == (missing[taken % 4] == 1)
        else:
            rows.lose(seat)
            empty.add(seat)
        assert rows.whole == sum(all(one % 4 != row for one in empty) for row in range(4))


def test_templates_deal_micro_batches_so_that_no_other_way_is_quicker() -> None:
    job = Job(Layers((1.0,) * 12, head=2.0), 4, 3, 4)
    templates = Templates(job, 1)
    for counts in ((0, 0, 0, 0, 3), (0, 0, 0, 1, 2), (0, 0, 1, 1, 1), (0, 1, 0, 0, 1)):
        lengths = [length for length, rows in enumerate(counts) for _ in range(rows)]
        best = min(
            max((micros + length - 1) * templates.tick(length) for micros, length in zip(dealt, lengths, strict=True))
            for dealt in itertools.product(range(1, 13), repeat=len(lengths))
            if sum(dealt) == job.micros
        )
        assert templates.seconds(counts) == pytest.approx(best, rel=1e-6)


@given(st.lists(st.integers(0, 11), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_every_machine_is_in_one_pipeline_or_waits(seats: list[int]) -> None:
    job = Job(Layers((1.0,) * 12), 4, 3, 4)
    way = Reshaping(12, Templates(job, 1), 4, 2, 1.0, 1.0, 1.0, 10.0)
    gone: set[int] = set()
    for seat in seats:
        if seat in gone:
            taken, _ = way.come()
            gone.remove(taken)
        else:
            way.lose([seat], 0.0)
            gone.add(seat)
        lengths = way.lengths
        used = sum(length * rows for length, rows in enumerate(lengths))
        waiting = 12 - len(gone) - used
        assert sum(lengths) == 3
        assert lengths[1] == 0
        assert waiting in (0, 1)
        assert not waiting or not any(lengths[2:4])  # nobody waits who could make a pipeline longer
        assert (way.speed > 0) == (used > 0)
        assert way.speed <= 1
    if not gone:
        assert way.lengths == (0, 0, 0, 0, 3)


def test_a_restarted_job_takes_a_replica_in_when_that_is_worth_it() -> None:
    """One of four replicas is away for a while: it is waited for at the next loss, unless losses are far apart."""

    def outcome(apart: float, again: bool = False) -> tuple[float, int]:
        events = [(100.0, "fail", 0, 200.0, 0.0, 1.0)] + [(1000.0, "fail", 1, 1e5, 0.0, 1.0)] * again
        trace = Trace.of(4, 1e5, events)
        found = play(Restart(4, 1, Counted(), 1, 50.0, 10.0, apart), trace, Course(4000, 1.0, 1e9, 10.0))
        return found.stopped, found.restarts

    assert outcome(apart=1e4) == (50 + 60, 1)
    assert outcome(apart=200.0) == (50, 1)
    assert outcome(apart=200.0, again=True) == (100, 2)


def test_who_has_not_been_taken_in_yet_ends_nothing() -> None:
    trace = Trace.of(4, 1e5, [(100.0, "fail", 0, 200.0, 0.0, 1.0), (300.0, "fail", 0, 1e5, 0.0, 1.0)])
    found = play(Restart(4, 1, Counted(), 1, 50.0, 10.0, 200.0), trace, Course(4000, 1.0, 1e9, 10.0))
    assert (found.restarts, found.losses, found.stopped) == (1, 2, 50)
