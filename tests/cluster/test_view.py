"""Views and their changes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.cluster.changes import NobodyLeftError, changed, first_view
from resilin.cluster.view import Stage, View, ViewError


@st.composite
def views(draw: st.DrawFn) -> View:
    members = draw(st.integers(1, 9))
    stages = draw(st.integers(1, min(3, members)))
    hosts = {number: f"host{draw(st.integers(0, 2))}" for number in range(members)}
    return first_view(range(members), hosts, stages, copies=draw(st.integers(1, 3)))


@st.composite
def teams(draw: st.DrawFn) -> View:
    tensor, count = draw(st.integers(2, 3)), draw(st.integers(1, 5))
    members = tensor * count + draw(st.integers(0, tensor - 1))
    hosts = {number: f"host{draw(st.integers(0, 2))}" for number in range(members)}
    stages = draw(st.integers(1, min(2, count)))
    return first_view(range(members), hosts, stages, copies=draw(st.integers(1, 3)), tensor=tensor)


def fair(view: View) -> bool:
    for stage in view.stages:
        counts = [Counter(stage.shards)[number] for number in stage.leads]
        if max(counts) - min(counts) > 1:
            return False
    return True


@given(views(), st.data())
@settings(max_examples=60)
def test_a_loss_moves_only_what_the_lost_owned(view: View, data: st.DataObject):
    stage = data.draw(st.sampled_from([s for s in view.stages if len(s.members) > 1] or [None]))
    if stage is None:
        return
    gone = data.draw(st.sampled_from(stage.members))
    after = changed(view, [gone])
    assert (after.epoch, fair(after)) == (view.epoch + 1, True)
    for old, new in zip(view.stages, after.stages, strict=True):
        assert all(a == b for a, b in zip(old.shards, new.shards, strict=True) if a != gone)


@given(views())
@settings(max_examples=60)
def test_a_newcomer_takes_its_share_and_no_more(view: View):
    after = changed(view, come={50: "new"})
    moved = sum(
        a != b for o, n in zip(view.stages, after.stages, strict=True) for a, b in zip(o.shards, n.shards, strict=True)
    )
    at = after.stages[after.stage_of(50)]
    assert fair(after)
    assert moved == Counter(at.shards)[50] == 64 // len(at.members)


@given(views())
@settings(max_examples=60)
def test_copies_are_elsewhere_and_on_other_machines_if_there_are_any(view: View):
    for number, holders in view.holders.items():
        assert number not in holders
        assert len(holders) == min(view.copies, len(view.members) - 1) == len(set(holders))
        others = {host for one, host in view.hosts.items() if host != view.hosts[number]}
        if others:
            assert view.hosts[holders[0]] != view.hosts[number]


@given(views())
@settings(max_examples=30)
def test_a_view_comes_back_from_json_with_its_digest(view: View):
    again = View.of_json(view.json())
    assert (again, again.digest) == (view, view.digest)


def test_a_stage_that_loses_its_last_member_gets_one_of_the_largest():
    view = first_view(range(5), dict.fromkeys(range(5), "h"), stages=2)
    after = changed(view, [3, 4])
    assert [stage.members for stage in after.stages] == [(0, 1), (2,)]
    assert set(after.stages[1].shards) == {2}


def test_fewer_members_than_stages_are_refused():
    view = first_view(range(2), dict.fromkeys(range(2), "h"), stages=2)
    with pytest.raises(NobodyLeftError, match="1 of 2 members are left"):
        changed(view, [1])
    with pytest.raises(NobodyLeftError, match="cannot hold 3"):
        first_view([0], {0: "h"}, stages=3)


@pytest.mark.parametrize(
    ("stages", "hosts", "match"),
    [
        ((Stage((0, 0), (0,)),), {0: "h"}, "two places"),
        ((Stage((0,), (0,)),), {0: "h", 1: "h"}, "hosts are known"),
        ((Stage((), ()),), {}, "nobody holds stage 0"),
        ((Stage((0,), (1,)),), {0: "h"}, "1 owns a shard"),
    ],
)
def test_a_view_that_contradicts_itself_is_refused(stages: tuple, hosts: dict, match: str):
    with pytest.raises(ViewError, match=match):
        View(0, stages, hosts)


def test_what_is_no_view_is_refused():
    with pytest.raises(ViewError, match="no view"):
        View.of_json({"epoch": 1})


@given(teams(), st.data())
@settings(max_examples=60)
def test_a_team_that_is_broken_up_is_left_over_and_moves_only_what_it_owned(view: View, data: st.DataObject):
    number = data.draw(st.sampled_from(view.members))
    team = view.team_of(number)
    if sum(len(stage.teams) for stage in view.stages) == len(view.stages):
        with pytest.raises(NobodyLeftError, match=f"teams of {view.tensor}"):
            changed(view, [number])
        return
    after = changed(view, [number])
    assert set(after.members) == set(view.members) - set(team)
    assert fair(after)
    if len(view.stages[view.stage_of(number)].teams) > 1:
        for old, new in zip(view.stages, after.stages, strict=True):
            assert all(a == b for a, b in zip(old.shards, new.shards, strict=True) if a != team[0])


@given(teams(), st.data())
@settings(max_examples=60)
def test_members_of_two_teams_that_were_broken_up_make_one_and_keep_their_parts(view: View, data: st.DataObject):
    stage = data.draw(st.sampled_from(view.stages))
    if len(stage.teams) < 2:
        return
    one, two = data.draw(st.permutations(stage.teams))[:2]
    place = data.draw(st.integers(0, view.tensor - 1))
    after = changed(view, [one[place], two[(place + 1) % view.tensor]])
    assert len(after.members) == len(view.members) - view.tensor
    fresh = [
        team for each in after.stages for team in each.teams if team not in sum((s.teams for s in view.stages), ())
    ]
    assert len(fresh) == 1
    before = {number: part for team in (one, two) for part, number in enumerate(team)}
    if view.tensor == 2:  # of each part there is one left
        assert [before[number] for number in fresh[0]] == [0, 1]


@given(teams())
@settings(max_examples=60)
def test_copies_are_with_the_same_part_of_another_team_if_there_is_one(view: View):
    for number, holders in view.holders.items():
        team = view.team_of(number)
        others = [one for one in view.members if one not in team]
        elsewhere = [one for one in others if view.hosts[one] != view.hosts[number]]
        alike = {one for stage in view.stages for one in stage.part(team.index(number))}
        if len(set(view.hosts.values())) == 1:
            assert len(set(holders) - set(team)) == min(view.copies, len(others))
        if elsewhere:
            assert holders[0] in elsewhere
        if alike & set(elsewhere):
            assert holders[0] in alike


@given(teams(), st.integers(1, 4))
@settings(max_examples=40)
def test_newcomers_take_part_as_whole_teams(view: View, count: int):
    after = changed(view, come={100 + number: f"host{number % 2}" for number in range(count)})
    news = {number for number in after.members if number >= 100}
    assert len(news) == count // view.tensor * view.tensor
    assert all(len({one >= 100 for one in team}) == 1 for stage in after.stages for team in stage.teams)
    assert View.of_json(after.json()) == after


def test_members_that_are_no_teams_are_no_view():
    with pytest.raises(ViewError, match="no teams of 2"):
        View(0, (Stage((0, 1, 2), (0,), 2),), dict.fromkeys(range(3), "h"))
