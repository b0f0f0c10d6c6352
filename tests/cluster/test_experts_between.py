"""Experts that the members of a view have between them: who has which, and how they come to the next view's members."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resilin.cluster.changes import changed, first_view
from resilin.cluster.links import Links
from resilin.cluster.restore import Owners, pieces_held, pieces_owned
from resilin.cluster.view import Stage, View, ViewError
from resilin.cluster.view_blueprint import ViewBlueprint
from resilin.cluster.view_world import ViewWorld
from resilin.layout import Region
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.degrees import Degrees
from resilin.run.elastic_moves import experts_between

EXPERTS = 6


def of(members: int, expert: int, copies: int = 1) -> View:
    return first_view(range(members), dict.fromkeys(range(members), "h"), copies=copies, expert=expert, experts=EXPERTS)


@cache
def model() -> Decoder:
    settings = DecoderSettings(
        vocab_size=8, hidden_size=8, heads=2, layers=2, mlp_size=8, moe=MoESettings(experts=EXPERTS, expert_size=3)
    )
    return Decoder(settings, seed=0)


def blueprint(view: View) -> ViewBlueprint:
    names = frozenset(name for name, _ in model().named_parameters() if ".experts." in name)
    assert names
    return ViewBlueprint(Blueprint.uncut(model(), Degrees()), view, {}, names)


@given(st.integers(1, 9), st.integers(1, 7), st.data())
@settings(max_examples=80, deadline=None)
def test_so_many_share_at_least_and_a_loss_moves_only_what_is_lost(members: int, expert: int, data: st.DataObject):
    view = of(members, expert)
    while len(view.members) > 1:
        (stage,) = view.stages
        assert len(stage.members) % stage.sharing == 0
        assert stage.sharing >= min(expert, len(stage.members))
        counts = [len(stage.experts_of(place)) for place in range(stage.sharing)]
        assert sum(counts) == EXPERTS
        assert max(counts) - min(counts) <= 1
        assert View.of_json(view.json()) == view
        gone = data.draw(st.sampled_from(view.members))
        after = changed(view, [gone], {50 + view.epoch: "h"} if data.draw(st.booleans()) else None)
        (new,) = after.stages
        if stage.sharing == len(stage.members) and new.sharing == len(new.members) <= len(stage.members):
            had, has = ([each.members[owner] for owner in each.experts] for each in (stage, new))
            came = set(new.members) - set(stage.members)
            assert all(a == b for a, b in zip(had, has, strict=True) if a != gone and not came)
        view = after if len(after.members) < len(view.members) else changed(after, [after.members[0]])


def test_a_view_whose_experts_are_nowhere_is_refused():
    with pytest.raises(ViewError, match="has experts at"):
        View(0, (Stage((0, 1), (0, 1), sharing=2, experts=(0, 2)),), dict.fromkeys((0, 1), "h"))
    with pytest.raises(ViewError, match="2 of 3 teams of stage 0 share experts"):
        View(0, (Stage((0, 1, 2), (0, 1, 2), sharing=2, experts=(0, 1)),), dict.fromkeys((0, 1, 2), "h"))


def owned(values: dict[str, Tensor], owners: Sequence[Owners], member: int) -> dict[str, Tensor]:
    """What a member has in its copy, in its order there."""
    found = {}
    for each in owners:
        if member in each.members:
            for number, name in enumerate(each.names):
                parts = each.owned(number, each.members.index(member))
                found[name] = torch.cat([values[name].flatten()[_at(part)] for part in parts] or [torch.empty(0)])
    return found


def _at(region: Region) -> slice:
    return slice(region.offsets[0], region.offsets[0] + region.sizes[0])


@given(st.integers(1, 8), st.integers(1, 6), st.sets(st.integers(0, 7), max_size=3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_next_views_members_get_what_they_have_out_of_copies(members: int, expert: int, gone: set[int], come: int):
    before = of(members, expert)
    gone = {number for number in gone if number < members}
    if len(gone) >= members + come or len(gone) == members:
        return
    after = changed(before, gone, {20 + number: "h" for number in range(come)})
    values = {name: torch.randn(p.shape) for name, p in model().named_parameters()}
    old, new = blueprint(before), blueprint(after)
    copies = {member: owned(values, old.all_owners(), member) for member in before.members}
    whole = sum(value.numel() for value in values.values())
    for view, known in ((before, old), (after, new)):
        mine = [owned(values, known.all_owners(), member) for member in view.members]
        assert sum(part.numel() for parts in mine for part in parts.values()) == whole  # each element has one owner
    for member in after.members:
        lists = new.owners_with(member)
        wanted = {**owned(values, lists, member)}
        for name, pieces in pieces_owned(old.all_owners(), lists, member).items():
            made = torch.empty(wanted[name].numel())
            for piece in pieces:
                made[piece.at : piece.at + piece.values] = copies[piece.owner][name][piece.start :][: piece.values]
            assert torch.equal(made, wanted[name]), name
        held = {
            name: torch.cat([values[name].flatten()[_at(region)] for region in each.held(number)])
            for each in lists
            for number, name in enumerate(each.names)
        }
        for name, pieces in pieces_held(old.all_owners(), lists, list(held), member).items():
            made = torch.empty(held[name].numel())
            for piece in pieces:
                made[piece.at : piece.at + piece.values] = copies[piece.owner][name][piece.start :][: piece.values]
            assert torch.equal(made, held[name]), name


@given(st.integers(1, 8), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_a_members_world_blueprint_and_owners_say_the_same(members: int, expert: int):
    view = of(members, expert)
    known, (stage,) = blueprint(view), view.stages
    tensors = {
        name: ("weight", name, tuple(p.shape), "F32") for name, p in model().named_parameters() if name in known.experts
    }
    layout = known.layout(tensors)
    for rank, member in enumerate(view.members):
        world = ViewWorld(view, member, Links.__new__(Links))  # asked for its groups' members only
        assert world.axis("ep") * world.axis("edp") == world.axis("dp") == members
        (together,), (alike,) = world.members("ep"), world.members("rep", "edp")
        assert together.index(rank) == world.coordinate("ep")
        assert alike.index(rank) == world.coordinate("edp")
        assert (len(together), len(alike)) == (stage.sharing, members // stage.sharing)
        assert [view.members[other] for other in alike] == list(stage.with_experts(0, world.coordinate("ep")))
        mine = stage.experts_of(world.coordinate("ep"))
        for name in tensors:
            size = math.prod(tensors[name][2]) // EXPERTS * len(mine)
            assert sum(each.region.numel for each in layout.at(world.place) if each.tensor == name) == size


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_gradients_of_every_expert_go_from_all_who_had_it_to_all_who_own_it(members: int, expert: int, more: int):
    before = of(members, expert)
    after = changed(before, (), {60 + number: "h" for number in range(more)})
    old, new = blueprint(before), blueprint(after)
    found = experts_between(old, new, {number: (number,) for number in before.members})
    assert len(found) == EXPERTS * len(new.experts)
    rank = {number: place for place, number in enumerate(after.members)}
    (was,), (now,) = before.stages, after.stages
    for (one, places), which in zip(found, [*range(EXPERTS)] * len(new.experts), strict=True):
        assert set(one.givers) == set(places) == {rank[n] for n in was.members if which in was.experts_with(n)}
        assert all(was.experts_with(n)[places[rank[n]]] == which for n in was.members if rank[n] in places)
        assert set(one.takers) == {rank[n] for n in now.members if which in now.experts_with(n)}
        owned = sorted(run for runs in one.takers.values() for run in runs)
        assert [begin for begin, _ in owned] == [0, *(end for _, end in owned[:-1])]
        assert owned[-1][1] == one.size == math.prod(new.specs[one.name].shape) // EXPERTS
        for taker, runs in one.takers.items():
            (mine,) = one.within(taker, [torch.arange(float(one.size * EXPERTS))]) if runs else (torch.empty(0),)
            assert len(mine) == sum(end - begin for begin, end in runs)
            assert not len(mine) or float(mine[0]) == one.first[taker]
