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


def fair(view: View) -> bool:
    for stage in view.stages:
        counts = [Counter(stage.shards)[number] for number in stage.members]
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
