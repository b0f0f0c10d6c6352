"""The membership protocol under thousands of schedules of failures, and rule by rule."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from elastic_simulation import MICROS, Plan, Sim, WrongError, simulate
from hypothesis import given
from hypothesis import strategies as st

from resilin.cluster.changes import first_view
from resilin.cluster.protocol import messages
from resilin.cluster.protocol.coordinator import Coordinator
from resilin.cluster.protocol.effects import Fence, Finish, Note, Tell
from resilin.cluster.protocol.messages import (
    Adopt,
    Beat,
    Committed,
    Done,
    End,
    Failed,
    Go,
    Halt,
    Halted,
    Hello,
    Isolate,
    Leaving,
    MessageError,
    Pause,
    Prepare,
    Probe,
    Probed,
    Ready,
    Signal,
    Told,
    Warm,
    of_json,
    to_json,
)  # fmt: skip
from resilin.cluster.protocol.reach import cut_off
from resilin.cluster.protocol.rules import Rules
from resilin.cluster.view import View

VIEW = first_view([0, 1, 2], dict.fromkeys(range(3), "here"))
EVERY = [
    Hello("here"), Warm(), Beat(3, "data 1", "forward", (1, 2), 0.5, "run.py:1"), Leaving(), Told({"event": "x"}),
    Halted(2, "lost", -1, None, ((0, 1, (3, 4)),), (5,)), Committed(1, 7, 3, 0.5), Done(1, 9, "c"),
    Ready(1, "a", "b", "c", {"plan": 0.5}, {"restore": 3}), Probe(1, (0,)), Probed(1, (2,)), Isolate("all", True, 0.5),
    Failed(3, "KeyError", "trace"), Halt(1, "why"), Pause(1, "why", True), Prepare(VIEW, VIEW, 4), Go(2), Signal(15),
    End(0, "why"),
    Adopt(VIEW, None, 0, {}, {}), Adopt(VIEW, VIEW, 4, {0: 1, 1: 1}, {1: (2, 3)}),
]  # fmt: skip


def many(seeds: int, broken: frozenset[str]) -> None:
    for seed in range(seeds):  # without teams failures hit more of what matters
        plan = Plan.drawn(seed)
        Sim(replace(plan, members=plan.members // plan.tensor, tensor=1), broken=broken).run()


@pytest.mark.parametrize("block", range(6))
def test_no_schedule_of_failures_breaks_it(block: int):
    for seed in range(50 * block, 50 * block + 50):
        simulate(seed)


def test_when_all_are_told_to_go_they_save_together_and_end():
    ended = []
    for seed in range(40):
        at = 0.9 + 0.03 * seed  # while they get ready, step, and change
        plan = Plan(seed, 40, 3, [(at + 0.05 * number, "drain", number) for number in range(3)])
        ended.append(Sim(plan, Rules(members=3, silence=3.0, hang=50.0)).run())
    assert all(sim.finish is not None and sim.finish.good and sim.coordinator.homeward for sim in ended)
    assert len({sim.ended_at for sim in ended}) > 5


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_no_schedule_of_ten_thousand_breaks_it(block: int):
    for seed in range(300 + 500 * block, 300 + 500 * block + 500):
        simulate(seed)


@pytest.mark.parametrize("duty", ["acks", "forget", "kept", "stale"])
def test_the_simulation_notices_a_duty_that_is_neglected(duty: str):
    with pytest.raises(WrongError):
        many(300, frozenset({duty}))


def test_a_schedule_happens_again_to_the_letter():
    first, again = simulate(13), simulate(13)
    assert (first.now, first.count, first.notes) == (again.now, again.count, again.notes)


def test_without_events_nothing_changes():
    sim = Sim(Plan(1, 6, 3)).run()
    assert sim.finish == Finish(True, "all 6 steps were taken")
    assert [note.facts["epoch"] for note in sim.notes if note.what == "change"] == [0]


def test_a_single_loss_costs_no_step_and_no_micro_batch_that_was_kept():
    sim = Sim(Plan(3, 12, 4, [(2.0, "kill", 1)])).run()
    (change,) = [note.facts for note in sim.notes if note.what == "change" and note.facts["epoch"] == 1]
    assert (sim.finish.good, change["redone"] <= 1, len(change["members"])) == (True, True, 3)


def test_who_is_left_over_waits_and_makes_a_team_with_a_newcomer():
    sim = Sim(Plan(3, 40, 4, [(2.0, "kill", 1), (3.0, "add", 0)], tensor=2)).run()
    happened = [note.facts for note in sim.notes if note.what == "change"]
    spares = [note.facts["member"] for note in sim.notes if note.what == "spare"]
    begun, lost, joined = (change["members"] for change in happened)
    (team,) = [pair for pair in (begun[:2], begun[2:]) if 1 in pair]
    assert (sim.finish.good, spares) == (True, [number for number in team if number != 1])
    assert lost == [number for number in begun if number not in team]
    assert joined[:2] == lost
    assert sorted(joined[2:]) == sorted([*spares, 4])
    assert sum(change["redone"] for change in happened) <= 1


def test_where_too_few_for_a_team_would_stay_all_save_and_end():
    sim = Sim(Plan(5, 40, 2, [(2.0, "drain", 1)], tensor=2)).run()
    assert (sim.finish.good, sim.coordinator.homeward) == (True, True)


def cut_off_at(second: float, what: str, sim: Sim) -> Sim:
    sim.at(second, lambda: sim.members[1].isolate(what, 90.0))
    return sim


@pytest.mark.parametrize(
    ("what", "why"),
    [("apart", "is cut off"), ("sever", "is cut off"), ("hold", "was not heard of"), ("unplug", "was not heard of")],
)
def test_one_that_is_cut_off_for_long_is_fenced_and_the_others_take_all_steps(what: str, why: str):
    for seed in range(8):
        sim = cut_off_at(1.5 + 0.05 * seed, what, Sim(Plan(seed, 30, 4))).run()
        changes = [note.facts for note in sim.notes if note.what == "change"]
        assert (sim.finish.good, changes[-1]["members"]) == (True, [0, 2, 3]), (seed, sim)
        (lost,) = [note.facts for note in sim.notes if note.what == "lost"]
        assert (lost["member"], why in lost["why"]) == (1, True)
        assert sum(change["redone"] for change in changes) <= 1


def with_slow_blocks(sim: Sim) -> Sim:
    sim.costs, sim.takes = (1.0,) * 6, (1.0, 1.0, 1.0, 3.0, 3.0, 1.0)
    return sim


def test_where_blocks_have_moved_in_the_middle_of_a_step_that_fails_it_is_computed_again():
    """A connection breaks, in many runs at another time each, around the change that moves blocks."""
    noticed = 0
    for number in range(25):
        plan = Plan(4, 30, 4, [(2.3 + 0.002 * number, "break", 0)], stages=2)
        assert with_slow_blocks(Sim(plan)).run().finish == Finish(True, "all 30 steps were taken")
        try:
            with_slow_blocks(Sim(plan, broken=frozenset({"handed"}))).run()
        except WrongError:
            noticed += 1
    assert noticed, "whoever keeps what was handed on is found out"


def test_blocks_follow_what_they_have_taken_once_that_is_known_and_the_states_stay():
    """By what they compute all blocks are alike; the last ones take longer."""
    sim = with_slow_blocks(Sim(Plan(4, 30, 4, stages=2))).run()
    changes = [note.facts for note in sim.notes if note.what == "change"]
    assert sim.finish == Finish(True, "all 30 steps were taken")
    assert [(change["costs"], change["layers"]) for change in changes] == [
        ("by FLOPs", [0, 3, 5]), ("measured", [0, 4, 5]),
    ]  # fmt: skip
    assert all(reason["costs"] == "measured" for reason in changes[1]["planned"])
    assert "blocks measured" in changes[1]["why"]
    assert (changes[1]["redone"], changes[1]["kept"]) == (0, 2 * MICROS), "they moved in the middle of a step"


@pytest.mark.parametrize("message", EVERY, ids=lambda message: message.kind)
def test_a_message_comes_back_from_json(message: messages.Message):
    assert of_json(to_json(message)) == message


@pytest.mark.parametrize(
    "told", [{}, {"kind": "go"}, {"kind": "go", "epoch": 1, "more": 2}, {"kind": "adopt", "view": 3}, {"kind": ["go"]}]
)
def test_what_is_no_message_is_refused(told: dict):
    with pytest.raises(MessageError):
        of_json(told)


@given(st.dictionaries(st.text(max_size=8), st.one_of(st.integers(), st.text(max_size=8), st.none()), max_size=4))
def test_anything_else_is_refused_too(told: dict):
    with pytest.raises(MessageError):
        of_json(told | {"kind": "halted"})


class Job:
    """A coordinator with members that are asked to say things."""

    def __init__(self, members: int, experts: int = 0, **rules: object) -> None:
        self.coordinator = Coordinator(Rules(members=members, **rules))
        self.now, self.effects = 0.0, []
        for number in range(members):
            self.say(number, Hello("here"))
            self.say(number, Warm(experts=experts))

    def say(self, number: int, message: messages.Message) -> list:
        self.effects = self.coordinator.told(number, message, self.now)
        return self.effects

    def told(self, kind: type) -> dict[int, messages.Message]:
        return {e.number: e.message for e in self.effects if isinstance(e, Tell) and isinstance(e.message, kind)}

    def all_ready(self, state: str = "same") -> None:
        view = self.coordinator._next
        for number in view.members:
            self.say(number, Ready(view.epoch, view.digest, state))

    def halted(self, number: int, copies: list, kept: tuple[int, ...] = (), step: int = 5) -> list:
        epoch = self.coordinator.members[number].epoch
        return self.say(number, Halted(epoch, "lost", 5, step, tuple(copies), kept))


def test_all_go_only_when_all_are_ready():
    job = Job(3)
    assert set(job.told(Adopt)) == {0, 1, 2}
    view = job.coordinator._next
    assert not job.say(0, Ready(0, view.digest, "s"))
    assert not job.say(1, Ready(0, view.digest, "s"))
    job.say(2, Ready(0, view.digest, "s"))
    assert set(job.told(Go)) == {0, 1, 2}


def test_a_change_is_noted_with_its_view_and_what_it_took_at_everyone():
    job = Job(2)
    view = job.coordinator._next
    job.say(0, Ready(0, view.digest, "s", "", {"groups": 0.1, "plan": 0.2}, {"restore": 7}))
    (note,) = [e for e in job.say(1, Ready(0, view.digest, "s", "", {"groups": 0.3})) if isinstance(e, Note)]
    assert View.of_json(json.loads(json.dumps(note.facts["view"]))) == view
    assert note.facts["parts"] == {"0": {"groups": 0.1, "plan": 0.2}, "1": {"groups": 0.3}}
    assert note.facts["bytes"] == {"0": {"restore": 7}}


def test_of_a_lost_member_it_is_noted_how_long_nothing_had_been_heard():
    job = Job(2)
    job.all_ready()
    (note,) = [e for e in job.coordinator.gone(1, "was killed", job.now + 0.25) if isinstance(e, Note)]
    assert note.facts == {"member": 1, "why": "was killed", "silent": 0.25}


def test_members_with_different_states_do_not_train():
    job = Job(2)
    view = job.coordinator._next
    job.say(0, Ready(0, view.digest, "one"))
    (finish,) = [e for e in job.say(1, Ready(0, view.digest, "other")) if isinstance(e, Finish)]
    assert not finish.good
    assert "different states" in finish.why


def test_members_with_the_same_experts_have_to_have_them_alike():
    for last, good in (("e1", True), ("e2", False)):
        job = Job(4, experts=6, expert=2)
        view = job.coordinator._next
        assert view.alike_experts == [(0, 2), (1, 3)]
        for number, experts in enumerate(("e0", "e1", "e0")):
            job.say(number, Ready(0, view.digest, "same", experts))
        job.say(3, Ready(0, view.digest, "same", last))
        assert [e.good for e in job.effects if isinstance(e, Finish)] == ([] if good else [False])
        assert (set(job.told(Go)) == {0, 1, 2, 3}) == good


def test_the_digest_at_the_end_counts_every_expert_once():
    job = Job(4, experts=6, expert=2)
    for number in range(4):
        job.say(number, Ready(0, job.coordinator._next.digest, "same", f"e{number % 2}"))
    for number in range(4):
        job.say(number, Done(0, 9, "10", ("03", "05")[number % 2]))
    assert [e.facts["weights"] for e in job.effects if isinstance(e, Note) and e.what == "digest"] == [f"{0x18:016x}"]


def test_the_newest_version_that_is_whole_is_taken_and_kept_work_is_dealt():
    job = Job(3)
    job.all_ready()
    job.effects = job.coordinator.gone(1, "was killed", 1.0)
    assert set(job.told(Halt)) == {0, 2}
    job.halted(0, [(0, 0, (5, 6)), (2, 0, (5,))], (0, 1), step=5)
    job.halted(2, [(2, 0, (5, 6)), (1, 0, (5,))], (6,), step=5)
    adopt = job.told(Adopt)[0]
    assert (adopt.version, adopt.where, adopt.kept) == (5, {0: 0, 1: 2, 2: 2}, {0: (0, 1), 2: (6,)})
    assert adopt.view.members == (0, 2)


def test_a_run_that_has_taken_no_step_begins_again_without_copies():
    job = Job(3)
    job.all_ready()
    job.say(0, Committed(0, 5))
    job.coordinator.gone(1, "was killed", 1.0)
    job.halted(0, [(0, 0, (5,))])
    job.halted(2, [])
    adopt = job.told(Adopt)[2]
    assert (adopt.before, adopt.view.members, adopt.view.epoch) == (None, (0, 2), 1)


def test_states_that_are_lost_end_the_job_by_name():
    job = Job(3)
    job.all_ready()
    job.say(0, Committed(0, 3))
    job.coordinator.gone(1, "was killed", 1.0)
    job.coordinator.gone(2, "was killed", 1.0)
    (finish,) = [e for e in job.halted(0, [(0, 0, (5,)), (2, 0, (5,))]) if isinstance(e, Finish)]
    assert "member 1 (copied to [2])" in finish.why
    assert "--resume" in finish.why


def test_who_is_silent_is_fenced_and_not_heard_any_more():
    job = Job(2, silence=3.0)
    job.all_ready()
    job.now = 2.0
    job.say(0, Beat(1, "", "forward", (1,), 0.1, ""))
    effects = job.coordinator.tick(4.0)
    assert [e.number for e in effects if isinstance(e, Fence)] == [1]
    assert not job.say(1, Committed(0, 9))
    assert job.coordinator.version == 0


def test_who_hangs_is_fenced_but_not_who_waits():
    job = Job(2, hang=60.0)
    job.all_ready()
    job.now = 90.0
    job.say(0, Beat(1, "", "exchanging gradients", (1,), 90.0, ""))
    job.say(1, Beat(1, "", "reading its slots", (), 61.0, "mine.py:3"))
    effects = job.coordinator.tick(90.1)
    assert [(e.number, "mine.py:3" in e.why) for e in effects if isinstance(e, Fence)] == [(1, True)]


def ended(job: Job, numbers: tuple[int, ...], copies: list | None = None) -> list:
    """A connection between two has ended, and they have come out, nobody being dead."""
    for number in numbers:
        job.halted(number, copies if copies is not None else [(n, 0, (5,)) for n in range(len(numbers))])
    return job.effects


def test_where_a_connection_ends_and_nobody_is_dead_all_are_asked_whom_they_reach():
    job = Job(3)
    job.all_ready()
    job.say(0, Committed(0, 5))
    ended(job, (0, 1, 2))
    asked = job.told(Probe)
    assert {number: probe.members for number, probe in asked.items()} == dict.fromkeys(range(3), (0, 1, 2))
    for number in range(3):
        assert not job.told(Adopt)
        job.say(number, Probed(asked[0].number, ()))
    assert job.told(Adopt)[0].view.members == (0, 1, 2)  # a cable that was loose for a moment


def test_who_is_cut_off_from_the_others_is_fenced_and_the_others_go_on():
    job = Job(3)
    job.all_ready()
    job.say(0, Committed(0, 5))
    ended(job, (0, 1, 2))
    number = job.told(Probe)[0].number
    job.say(1, Probed(number, (0, 2)))
    job.say(0, Probed(number, (1,)))
    effects = job.say(2, Probed(number, ()))  # its way to the others may still be open in one direction
    (fence,) = [e for e in effects if isinstance(e, Fence)]
    assert (fence.number, fence.why) == (1, "is cut off from member 0, 2")
    assert (set(job.told(Adopt)), job.told(Adopt)[0].view.members) == ({0, 2}, (0, 2))
    assert not job.say(1, Ready(1, "", ""))  # a stranger from now on
    assert not job.say(1, Committed(1, 9))
    assert job.coordinator.version == 5


def test_several_that_are_cut_off_at_once_are_one_change():
    job = Job(5, copies=2)
    job.all_ready()
    job.say(0, Committed(0, 5))
    ended(job, (0, 1, 2, 3, 4))
    number = job.told(Probe)[0].number
    for member in range(4):
        job.say(member, Probed(number, (2, 3) if member not in (2, 3) else (0, 1, 4)))
    effects = job.say(4, Probed(number, (2, 3)))
    assert [e.number for e in effects if isinstance(e, Fence)] == [2, 3]
    assert job.told(Adopt)[0].view.members == (0, 1, 4)
    assert job.coordinator._epoch == 1


def beats(job: Job, seconds: float) -> list:
    for number in list(job.coordinator.members):
        job.say(number, Beat(1, "", "exchanging gradients", (0, 1), seconds, ""))
    return job.coordinator.tick(job.now)


def test_where_nobody_begins_anything_new_all_are_asked_and_only_slow_ones_stay():
    job = Job(2, silence=3.0)
    job.all_ready()
    job.now = 10.0
    assert not beats(job, 2.0)
    effects = job.effects = beats(job, 3.1)
    number = job.told(Probe)[0].number
    assert [e.what for e in effects if isinstance(e, Note)] == ["probe"]
    job.say(0, Probed(number, ()))
    assert not job.say(1, Probed(number, ()))
    job.now = 12.0
    assert not beats(job, 5.0)  # not again at once
    job.now = 16.5
    job.effects = beats(job, 9.0)
    number = job.told(Probe)[0].number
    job.say(0, Probed(number, (1,)))
    assert [e.number for e in job.say(1, Probed(number, (0,))) if isinstance(e, Fence)] == [1]


def test_who_does_not_tell_whom_it_reaches_goes():
    job = Job(3, silence=3.0)
    job.all_ready()
    job.say(0, Committed(0, 5))
    ended(job, (0, 1, 2))
    number = job.told(Probe)[0].number
    job.say(0, Probed(number, ()))
    job.say(1, Probed(number, ()))
    for job.now in (2.0, 4.0, 6.0, 8.0, 9.5):
        effects = beats(job, 1.0)
    assert [(e.number, e.why) for e in effects if isinstance(e, Fence)] == [(2, "did not tell whom it reaches")]


@given(st.sets(st.integers(0, 9), min_size=2), st.data())
def test_of_two_sides_the_smaller_one_is_cut_off(members: set[int], data: st.DataObject):
    side = data.draw(st.sets(st.sampled_from(sorted(members)), max_size=(len(members) - 1) // 2))
    lacking = {one: sorted(members - side) if one in side else sorted(side) for one in members}
    assert {number for number, _ in cut_off(sorted(members), lacking)} == side


@given(st.integers(2, 8), st.data())
def test_whatever_the_answers_those_who_are_left_reach_each_other(count: int, data: st.DataObject):
    pairs = data.draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=12))
    lacking = {one: [b for a, b in pairs if a == one and b != one] for one in range(count)}
    gone = {number for number, _ in cut_off(range(count), lacking)}
    left = set(range(count)) - gone
    assert left
    assert not [pair for pair in pairs if set(pair) <= left and len(set(pair)) == 2]


def test_time_in_which_the_coordinator_itself_did_not_run_is_not_silence():
    job = Job(2, silence=3.0)
    job.all_ready()
    job.coordinator.tick(0.5)
    assert not job.coordinator.tick(60.0)  # it was stopped, and has not yet read what came meanwhile
    assert not job.coordinator.tick(60.1)
    assert not [effect for tenth in range(5, 25) for effect in job.coordinator.tick(60 + tenth / 10)]
    assert [e.number for e in job.coordinator.tick(62.7) if isinstance(e, Fence)] == [0, 1]


def test_a_newcomer_is_taken_in_at_a_boundary_and_a_leaver_goes_after_its_states_are_read():
    job = Job(2)
    job.all_ready()
    job.say(7, Hello("there"))
    job.say(7, Warm())
    assert not job.told(Pause)  # not before a step was taken
    job.say(0, Committed(0, 4))
    job.say(0, Committed(0, 5))
    assert set(job.told(Pause)) == {0, 1}
    job.say(0, Leaving())
    job.halted(0, [(0, 0, (5,)), (1, 0, (5,))])
    job.halted(1, [(1, 0, (5,)), (0, 0, (5,))])
    adopt = job.told(Adopt)[7]
    assert (set(job.told(Adopt)), adopt.view.members, adopt.where) == ({1, 7}, (1, 7), {0: 0, 1: 1})
    job.all_ready()
    assert not job.told(End)  # its memory may still be needed: the copies of the new view are on their way
    job.say(7, Committed(1, 5))
    job.say(7, Committed(1, 6))
    assert set(job.told(End)) == {0}
    assert not job.told(Pause)


def test_a_newcomer_reads_while_the_others_compute_and_all_end_that_step_together():
    job = Job(2)
    job.all_ready()
    job.say(0, Committed(0, 4))
    job.say(0, Committed(0, 5))
    job.say(7, Hello("there"))
    job.say(7, Warm())
    job.say(1, Committed(0, 5))
    assert not job.told(Pause)  # the step is under way: it would read too late for it
    job.say(1, Committed(0, 6))
    prepare = job.told(Prepare)[7]
    assert {number: pause.computed for number, pause in job.told(Pause).items()} == {0: True, 1: True}
    assert (prepare.before.epoch, prepare.version) == (0, 6)
    job.say(0, Halted(0, "", 6, 6, ((0, 0, (5, 6)), (1, 0, (5, 6))), (0,)))
    job.say(1, Halted(0, "", 6, 6, ((0, 0, (5, 6)), (1, 0, (5, 6))), (1,)))
    adopt = job.told(Adopt)[7]
    assert (adopt.view, adopt.before, adopt.version) == (prepare.view, prepare.before, 6)
    assert adopt.where == {0: 0, 1: 1}
    assert adopt.kept == {0: (0,), 1: (1,)}


@pytest.mark.parametrize("all_of_it", [True, False])
def test_where_no_parts_of_a_step_are_kept_all_of_it_is_or_nothing(all_of_it: bool):
    job = Job(2, keeps_parts=False)
    job.all_ready()
    job.say(0, Committed(0, 4))
    job.say(7, Hello("there"))
    job.say(7, Warm())
    job.say(0, Committed(0, 5))
    assert set(job.told(Prepare)) == {7}
    for number in range(2):
        kept = (number,) if all_of_it or not number else ()
        job.say(number, Halted(0, "", 5, 5, ((0, 0, (5,)), (1, 0, (5,))), kept, (2, 2) if kept else (0, 0)))
    adopt = job.told(Adopt)[7]
    assert (adopt.kept, adopt.cut) == (({0: (0,), 1: (1,)}, (2,)) if all_of_it else ({}, ()))


def test_members_whose_experts_become_more_read_them_while_they_compute():
    job = Job(5, experts=12, expert=2)
    job.all_ready()
    job.say(0, Committed(0, 4))
    job.say(7, Hello("there"))
    job.say(7, Warm())
    job.say(0, Committed(0, 5))
    prepare = job.told(Prepare)[7]
    old, new = prepare.before.stages[0], prepare.view.stages[0]
    assert (old.sharing, new.sharing) == (5, 2)
    more = {n for n in range(5) if not {*new.experts_with(n)} <= {*old.experts_with(n)}}
    assert set(job.told(Prepare)) == {7, *more} > {7}


def test_one_that_is_about_to_go_dies_and_nobody_comes_out():
    job = Job(2)
    job.all_ready()
    job.say(0, Committed(0, 5))
    job.say(0, Leaving())
    job.halted(0, [(0, 0, (5,)), (1, 0, (5,))])
    job.halted(1, [(1, 0, (5,)), (0, 0, (5,))])
    job.all_ready()
    job.effects = job.coordinator.gone(0, "was killed", 1.0)
    assert not job.told(Halt)
    assert job.coordinator.phase == "running"


def test_a_single_loss_while_a_leaver_goes_is_recovered_from_the_leavers_memory():
    job = Job(3)
    job.all_ready()
    job.say(0, Committed(0, 5))
    job.say(0, Committed(0, 6))
    job.say(0, Leaving())
    for number in range(3):  # 0 is copied to 1, 1 to 2, 2 to 0
        job.halted(number, [(number, 0, (6,)), ((number + 2) % 3, 0, (6,))], step=6)
    job.all_ready()
    job.effects = job.coordinator.gone(1, "was killed", 1.0)  # before its copies of the new view are anywhere
    job.halted(2, [(2, 0, (6,)), (1, 0, (6,)), (2, 1, (6,))], step=6)
    adopt = job.told(Adopt)[2]
    assert (adopt.before.epoch, adopt.version, adopt.where, adopt.view.members) == (0, 6, {0: 0, 1: 2, 2: 2}, (2,))


def test_newcomers_one_after_the_other_join_together_once_a_step_was_taken():
    job = Job(1)
    job.all_ready()
    job.say(0, Committed(0, 5))
    for number in range(1, 8):
        job.say(number, Hello("here"))
        assert not job.say(number, Warm())[1:]  # noted, and no more
    job.say(0, Committed(0, 6))
    assert set(job.told(Pause)) == {0}
    job.halted(0, [(0, 0, (6,))], step=6)
    assert set(job.told(Adopt)) == set(range(8))


def test_members_that_leave_one_after_the_other_are_no_failures():
    job = Job(5, aborted=2)
    job.all_ready()
    job.say(0, Committed(0, 5))
    for number in range(4):
        view = job.coordinator.view
        job.say(number, Leaving())
        for member in view.members:
            job.halted(member, [(owner, view.epoch, (5,)) for owner in view.members])
        job.all_ready()
    assert (job.coordinator.phase, job.coordinator.view.members) == ("running", (4,))


def test_a_loss_before_anyone_has_kept_a_copy_begins_the_run_again():
    job = Job(3)
    job.all_ready()
    job.coordinator.gone(1, "was killed", 1.0)  # while the model is evaluated before the first step, say
    job.halted(0, [])
    job.halted(2, [])
    assert job.told(Adopt)[0].before is None


def test_newcomers_alone_never_begin_a_run_again():
    job = Job(1)
    job.all_ready()
    for version in (5, 6):
        job.say(0, Committed(0, version))
    job.say(7, Hello("here"))
    job.say(7, Warm())
    job.halted(0, [(0, 0, (6,))], step=6)
    assert set(job.told(Adopt)) == {0, 7}
    job.coordinator.gone(0, "was killed", 1.0)
    job.effects = job.coordinator.told(7, Halted(1, "lost", None, None, (), ()), 1.0)
    (finish,) = [e for e in job.effects if isinstance(e, Finish)]
    assert "lost with everyone" in finish.why


def test_one_that_has_ended_its_work_comes_out_too_when_another_breaks_during_a_pause():
    job = Job(2)
    job.all_ready()
    job.say(0, Committed(0, 5))
    job.say(1, Leaving())
    assert set(job.told(Pause)) == {0, 1}
    job.say(0, Done(0, 6, "weights"))
    job.say(1, Halted(0, "a connection broke", 5, 5, (), ()))
    assert set(job.told(Halt)) == {0}


def test_a_late_hello_does_not_bring_back_one_that_is_gone():
    job = Job(2)
    job.all_ready()
    job.coordinator.gone(1, "was killed", 1.0)
    job.say(1, Hello("here"))
    assert list(job.coordinator.members) == [0]


def test_a_program_that_fails_at_two_members_at_one_step_ends_the_job_with_its_trace():
    job = Job(3)
    job.all_ready()
    assert not [e for e in job.say(0, Failed(4, "KeyError: 'row'", "trace 0")) if isinstance(e, Finish)]
    (finish,) = [e for e in job.say(1, Failed(4, "KeyError: 'row'", "trace 1")) if isinstance(e, Finish)]
    assert (finish.good, finish.failure) == (False, "trace 0")


def test_changes_without_a_step_do_not_go_on_for_ever():
    job = Job(2, aborted=3)
    for _ in range(4):
        job.all_ready()
        ended(job, (0, 1), [(owner, epoch, (5,)) for epoch in range(9) for owner in (0, 1)])
        number = job.told(Probe)[0].number
        job.say(0, Probed(number, ()))
        job.say(1, Probed(number, ()))
    (finish,) = [e for e in job.effects if isinstance(e, Finish)]
    assert "without a step" in finish.why


def test_every_change_is_explained():
    job = Job(2)
    job.all_ready()
    (note,) = [e for e in job.effects if isinstance(e, Note)]
    assert {"epoch", "why", "members", "version", "redone", "kept", "shards_moved"} <= set(note.facts)
