"""Pipelines of any size, and what an action waits for said in another way than the code under test."""

from __future__ import annotations

from hypothesis import strategies as st

from resilin.parallel.pipeline import METHODS, Action, Kind, Schedule, build


@st.composite
def schedules(draw: st.DrawFn, most_ranks: int = 8, most_micros: int = 20) -> Schedule:
    """Any method with any numbers it takes."""
    name = draw(st.sampled_from(list(METHODS)))
    method = METHODS[name]
    ranks = draw(st.integers(1, most_ranks))
    chunks = method.chunks or draw(st.integers(1, 4))
    micros = draw(st.integers(1, most_micros))
    group = draw(st.none() | st.integers(ranks, 2 * ranks + 3)) if method.grouped else None
    return build(name, chunks * ranks, ranks, micros, group)


def inputs(schedule: Schedule) -> dict[Action, set[Action]]:
    """For each action, everything whose results it uses directly."""
    there = {one for row in schedule.actions for one in row}
    found = {}
    for action in there:
        stage, micro = action.stage, action.micro
        wanted = {
            Kind.F: [(Kind.F, stage - 1)],
            Kind.B: [(Kind.F, stage), (Kind.B, stage + 1), (Kind.I, stage + 1)],
            Kind.I: [(Kind.F, stage), (Kind.B, stage + 1), (Kind.I, stage + 1)],
            Kind.W: [(Kind.I, stage)],
        }[action.kind]
        found[action] = {Action(kind, at, micro) for kind, at in wanted} & there
    return found


def stuck(schedule: Schedule) -> set[Action]:
    """What can never run, found by trying every rank's next action again and again."""
    rows = [list(row) for row in schedule.actions]
    needed = inputs(schedule)
    done: set[Action] = set()
    moved = True
    while moved:
        moved = False
        for row in rows:
            if row and needed[row[0]] <= done:
                done.add(row.pop(0))
                moved = True
    return {action for row in rows for action in row}
