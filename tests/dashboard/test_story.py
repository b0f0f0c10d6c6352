"""What a run's events make up: curves without what a resume took back, changes with their parts, a map."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from event_lines import cluster, line, start, step, view
from hypothesis import given
from hypothesis import strategies as st

from resilin.cluster.changes import first_view
from resilin.cluster.step_cut import StepCut
from resilin.dashboard.changes import PARTS
from resilin.dashboard.cluster_map import map_of_settings, map_of_view, runs, runs_of_micros
from resilin.dashboard.follower import Follower
from resilin.dashboard.story import Story
from resilin.parallel.micro_batches import in_runs
from resilin.run.events import Evaluated, Event, Failure, RunEnded, Saved


def story_of(events: Sequence[Event]) -> Story:
    story = Story()
    story.read(b"".join(map(line, events)))
    return story


LOSS = [
    cluster("change", time=1000.0, epoch=0, why="the run begins", members=[0, 1, 2], version=0, redone=0, kept=0,
            shards_moved=0, halting=0.0, adopting=0.2, parts={}, bytes={}, view=view(0, (0, 1, 2))),
    start(time=999.9),
    step(1), step(2), step(3),
    cluster("lost", time=1003.4, member=1, why="was killed by SIGKILL", silent=0.3),
    cluster("change", time=1004.0, epoch=1, why="member 1 was killed by SIGKILL", members=[0, 2], version=3, redone=0,
            kept=5, shards_moved=3, halting=0.1, adopting=0.5,
            parts={"0": {"groups": 0.01, "engine": 0.02, "plan": 0.03, "restore": 0.04, "migrate": 0.05, "load": 0.06,
                         "verify": 0.07}, "2": {"groups": 0.01}},
            bytes={"0": {"restore": 100, "migrate": 50}, "2": {"migrate": 7}}, view=view(1, (0, 2))),
]  # fmt: skip


def test_the_parts_of_a_recovery_add_up_to_the_time_it_took():
    story = story_of([*LOSS, step(4, time=1004.9), step(5, time=1005.4)])
    change, begin = story.shown_changes()
    assert (begin["kind"], begin["before"], begin["gap"]) == ("begin", [], None)
    assert (change["kind"], change["before"], change["after"], change["went"]) == ("loss", [0, 1, 2], [0, 2], [1])
    assert change["lost"] == [{"member": 1, "why": "was killed by SIGKILL"}]
    assert (change["slowest"], change["cut_short"], change["step"]) == (0, True, 3)
    took = {one["part"]: one["seconds"] for one in change["timeline"]}
    assert took == pytest.approx(
        {"detect": 0.3, "halt": 0.1, "edit": 0.03, "replan": 0.03, "restore": 0.04, "migrate": 0.05, "verify": 0.13,
         "wait": 0.22, "redo": 0.9}
    )  # fmt: skip
    assert list(took) == list(PARTS)
    assert sum(took.values()) == pytest.approx(0.3 + 0.1 + 0.5 + 0.9)
    assert (change["gap"], change["usual"]) == (pytest.approx(1.9), 0.5)


def test_the_next_step_of_a_change_is_not_known_before_it_is_taken():
    change = story_of(LOSS).shown_changes()[0]
    assert change["gap"] is None
    assert "redo" not in [one["part"] for one in change["timeline"]]


@pytest.mark.parametrize(
    ("told", "members", "kind"),
    [
        ([("leaving", 2)], [0, 1], "leave"), ([("ready", 3)], [0, 1, 2, 3], "join"), ([], [0, 1, 2], "other"),
        ([("lost", 1), ("ready", 3)], [0, 2, 3], "loss"),
    ],
)  # fmt: skip
def test_what_a_change_was_for(told: list[tuple[str, int]], members: list[int], kind: str):
    events = LOSS[:5] + [cluster(what, time=1003.2, member=number, why="w", silent=0.1) for what, number in told]
    events.append(cluster("change", time=1003.3, epoch=1, why="w", members=members, version=3))
    story = story_of(events)
    assert story.shown_changes()[0]["kind"] == kind
    assert [mark["kind"] for mark in story.marks] == [kind]


def test_blocks_that_move_between_stages_are_a_change_with_its_reasons():
    before, after = view(1, (0,), (1,)), view(2, (0,), (1,)) | {"layers": [0, 1, 4]}
    planned = [
        {"axis": "random", "decision": "unchanged", "why": "keyed"},
        {"axis": "graph", "decision": "moved", "why": "one block", "seconds": {"before": 1.0, "after": 0.75}},
    ]
    story = story_of([
        cluster("change", time=1000.0, epoch=0, why="b", members=[0, 1], view=before), start(), step(1),
        cluster("change", time=1001.5, epoch=1, why="w", members=[0, 1], version=1, planned=planned, view=after),
    ])  # fmt: skip
    change = story.shown_changes()[0]
    assert (change["kind"], change["cut_short"]) == ("move", False)
    assert [stage["layers"] for stage in change["stages_before"]] == [[0, 2], [2, 4]]
    assert [stage["layers"] for stage in change["stages_after"]] == [[0, 1], [1, 4]]
    assert change["planned"] == [
        {"axis": "random", "decision": "unchanged", "why": "keyed", "before": None, "after": None},
        {"axis": "graph", "decision": "moved", "why": "one block", "before": 1.0, "after": 0.75},
    ]


def test_what_was_said_before_one_change_is_not_told_of_the_next():
    again = cluster("change", time=1006.0, epoch=2, why="member 3 is ready", members=[0, 2, 3], version=4)
    newest, before, _ = story_of([*LOSS, step(4), again]).shown_changes()
    assert (newest["lost"], newest["came"], newest["kind"]) == ([], [3], "join")
    assert len(before["lost"]) == 1


def test_a_resume_takes_back_steps_evaluations_and_marks():
    events: list[Event] = [start(), *map(step, range(1, 9))]
    events += [Evaluated(time=1004.0, step=4, name="validation", metrics={"loss": 2.0})]
    events += [Saved(time=1004.5, step=4, path="p", bytes=1, seconds=0.1)]
    events += [Evaluated(time=1008.0, step=8, name="validation", metrics={"loss": 1.0})]
    events += [Failure(time=1008.5, step=8, kind="save", message="full")]
    events += [RunEnded(time=1009.0, step=8, reason="failed", seconds=9.0)]
    story = story_of(events)
    assert (story.end["reason"], story.steps.count) == ("failed", 8)
    story.read(line(start(4, time=2000.0)))
    assert (story.end, story.steps.count) == (None, 4)
    assert story.shown_evaluations() == {"validation": {"step": [4], "time": [1004.0], "loss": [2.0]}}
    assert [(mark["kind"], mark["step"]) for mark in story.marks] == [("save", 4), ("resume", 4)]
    story.read(line(step(5, 7.0, time=2001.0)))
    assert list(story.steps["loss"]) == [1.0, 1.0, 1.0, 1.0, 7.0]


def test_very_many_saves_hide_no_change():
    saves = [Saved(time=1003.0, step=3, path="p", bytes=1, seconds=0.1)] * 1000
    story = story_of([*LOSS, *saves])
    assert [mark["kind"] for mark in story.shown_marks()] == ["loss"]


def test_events_of_other_kinds_and_with_missing_fields_do_no_harm():
    raw = b'{"event":"new","time":1.0}\n{"event":"eval","time":1.0}\n{"event":"save","time":"x"}\n'
    story = Story()
    story.read(raw + line(step(1)))
    assert (story.strange, story.steps.count) == (2, 1)


# -- the map ----------------------------------------------------------------------------------------------------------


def status(*members: tuple[int, str], phase: str = "running") -> dict[str, Any]:
    told = [
        {"number": n, "host": "h", "process": 10 + n, "state": state, "step": 3, "doing": "computing", "seconds": 0.1,
         "holders": []}
        for n, state in members
    ]  # fmt: skip
    return {"phase": phase, "epoch": 1, "step": 3, "members": told}


def test_the_map_says_who_holds_what():
    found = map_of_view(
        view(3, (0, 2), (5,)), status((0, "in"), (5, "in"), (7, "warm"), (8, "starting")), StepCut(8, 1)
    )
    first, second = found["stages"]
    assert (first["layers"], second["layers"]) == ([0, 2], [2, 4])
    zero, two = first["members"]
    assert (zero["state"], zero["micros"], zero["shards"], zero["shard_count"]) == ("running", [0, 3], [[0, 3]], 4)
    assert (two["state"], two["micros"], two["shards"]) == ("lost", [4, 7], [[4, 7]])
    assert [(one["number"], one["micros"], one["shard_count"]) for one in second["members"]] == [(5, [0, 7], 8)]
    assert [(one["number"], one["state"]) for one in found["others"]] == [(7, "waiting"), (8, "starting")]


def test_copies_are_told_from_both_sides():
    members = map_of_view(view(0, (0, 1, 2), copies=2), None, StepCut(0, 0))["stages"][0]["members"]
    at = {one["number"]: one["copies_at"] for one in members}
    keeps = {one["number"]: one["keeps"] for one in members}
    assert all(len(holders) == 2 for holders in at.values())
    assert {(owner, holder) for owner, all_of in at.items() for holder in all_of} == {
        (owner, holder) for holder, all_of in keeps.items() for owner in all_of
    }
    assert {one["state"] for one in members} == {"ended"}


def test_a_view_that_is_none_is_told_in_words():
    assert map_of_view({"epoch": 1}, None, StepCut(0, 0))["kind"] == "unknown"


@given(st.integers(1, 60), st.integers(1, 20))
def test_micro_batches_are_those_that_workers_compute(micros: int, workers: int):
    expected = [[run.start, run.stop - 1] if run else None for run in in_runs(micros, workers)]
    assert runs_of_micros(micros, workers) == expected


@given(st.sets(st.integers(0, 30)))
def test_runs_of_neighbours_are_the_same_numbers(numbers: set[int]):
    found = runs(sorted(numbers))
    assert {n for low, high in found for n in range(low, high + 1)} == numbers
    assert all(low - before > 1 for (_, before), (low, _) in pairwise(found))


def test_settings_tell_the_layout_of_a_run_that_is_not_elastic():
    parallel = {"workers": 16, "pipeline": 2, "tensor": 2, "data": "auto"}
    found = map_of_settings({"parallel": parallel, "train": {"batch_size": 16, "micro_batch_size": 2}})
    assert (found["workers"], found["tensor"], len(found["stages"])) == (16, 2, 2)
    assert [one["ranks"] for one in found["stages"][0]["members"]] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [one["ranks"] for one in found["stages"][1]["members"]] == [[8, 9], [10, 11], [12, 13], [14, 15]]
    assert [one["micros"] for one in found["stages"][0]["members"]] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert map_of_settings({"parallel": {"data": "many"}})["kind"] == "unknown"


# -- a follower -------------------------------------------------------------------------------------------------------


def follower(folder: Path, events: Sequence[Event], answer: dict[str, Any] | Exception) -> Follower:
    folder.mkdir(exist_ok=True)
    (folder / "events.jsonl").write_bytes(b"".join(map(line, events)))

    def ask(workers: Path) -> dict[str, Any]:
        if isinstance(answer, Exception):
            raise answer
        return answer

    made = Follower(folder, ask)
    while made.look():
        pass
    return made


def test_a_live_run_is_what_its_launcher_says(tmp_path: Path):
    told = follower(tmp_path, LOSS, status((0, "in"), (2, "leaving"), (3, "starting"), phase="pausing")).state(now=1010)
    assert (told["run"]["state"], told["run"]["phase"], told["run"]["workers"]) == ("running", "pausing", 2)
    assert [one["state"] for one in told["map"]["stages"][0]["members"]] == ["running", "leaving"]
    assert [one["number"] for one in told["map"]["others"]] == [3]


def test_before_the_first_view_the_starting_workers_are_shown(tmp_path: Path):
    told = follower(tmp_path, [], status((0, "starting"), (1, "warm"), phase="gathering")).state()
    assert told["run"]["words"] == "workers are starting"
    assert [(one["number"], one["state"]) for one in told["map"]["others"]] == [(0, "starting"), (1, "waiting")]


@pytest.mark.parametrize(
    ("more", "now", "state"),
    [
        ([], 1010, "failed"),
        ([cluster("end", time=1005.0, good=False, why="2 members are left")], 1010, "failed"),
        ([RunEnded(time=1005.0, step=3, reason="completed", seconds=4), cluster("end", time=1005.1, good=True, why="")],
         1010, "completed"),
    ],
)  # fmt: skip
def test_how_an_elastic_run_ended(tmp_path: Path, more: list[Event], now: float, state: str):
    told = follower(tmp_path, [*LOSS, *more], FileNotFoundError()).state(now)
    assert told["run"]["state"] == state
    assert {one["state"] for one in told["map"]["stages"][0]["members"]} == {"ended"}


def test_a_launcher_that_does_not_answer_is_told(tmp_path: Path):
    told = follower(tmp_path, LOSS, ConnectionRefusedError("refused")).state(1010)
    assert told["trouble"] == "the launcher does not answer (refused)"


@pytest.mark.parametrize(("now", "state"), [(1004.0, "running"), (1061.0, "running"), (1064.0, "silent")])
def test_a_run_without_a_launcher_runs_until_it_is_silent_for_long(tmp_path: Path, now: float, state: str):
    told = follower(tmp_path, [start(), step(1), step(2), step(3)], FileNotFoundError()).state(now)
    assert told["run"]["state"] == state
    assert told["run"]["left_seconds"] == 97 * 0.5
    assert told["run"]["rate"] == 128.0


@pytest.mark.parametrize("weights", ["abc", "0f"])
def test_the_digest_is_shown(tmp_path: Path, weights: str):
    told = follower(tmp_path, [*LOSS, cluster("digest", time=1005.0, weights=weights)], FileNotFoundError()).state()
    assert told["run"]["digest"] == weights


def test_another_log_in_the_same_place_begins_another_story(tmp_path: Path):
    made = follower(tmp_path, [start(), step(1), step(2)], FileNotFoundError())
    (tmp_path / "events.jsonl").write_bytes(line(start()))
    made.look()
    assert made.state()["steps"] == 0


def test_the_map_says_who_has_which_experts() -> None:
    hosts = dict.fromkeys(range(3), "here")
    view = first_view(range(3), hosts, expert=2, experts=4)
    (stage,) = map_of_view(view.json(), None, StepCut(6, 1))["stages"]
    assert [one["experts"] for one in stage["members"]] == [[[0, 1]], [[2, 2]], [[3, 3]]]
    (plain,) = map_of_view(first_view(range(3), hosts).json(), None, StepCut(6, 1))["stages"]
    assert [one["experts"] for one in plain["members"]] == [None] * 3
