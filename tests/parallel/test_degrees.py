"""Degrees, meshes and groups of ranks."""

from __future__ import annotations

import math
import re

import pytest
from forked import run_ranks
from hypothesis import given
from hypothesis import strategies as st

from resilin.parallel.degrees import AXES, Degrees, solve
from resilin.parallel.errors import ParallelError
from resilin.parallel.world import World

SMALL = st.integers(1, 4)


def by_hand(degrees: Degrees, rank: int) -> dict[str, int]:
    """TorchTitan's order: pipeline outermost, then replicas, data, context, and tensor innermost."""
    found = {}
    for name, axis in reversed(AXES.items()):
        rank, found[axis] = divmod(rank, getattr(degrees, name))
    return found


@given(SMALL, SMALL, SMALL, SMALL, SMALL)
def test_ranks_are_numbered_row_major_with_tensor_parallelism_innermost(pp, rep, dp, cp, tp):
    degrees = Degrees(pp, rep, dp, cp, tp)
    coordinates = degrees.mesh.coordinates()
    for rank in range(degrees.workers):
        assert {axis: int(c[rank]) for axis, c in coordinates.items()} == by_hand(degrees, rank)


@given(SMALL, SMALL, SMALL, SMALL, st.integers(1, 8))
def test_the_experts_mesh_cuts_data_and_context_anew(pp, dp, cp, tp, ep):
    if (dp * cp) % ep:
        with pytest.raises(ParallelError, match=r"parallel\.expert is"):
            Degrees(pp, 1, dp, cp, tp, ep)
        return
    degrees = Degrees(pp, 1, dp, cp, tp, ep)
    dense, sparse = degrees.mesh.coordinates(), degrees.expert_mesh.coordinates()
    for rank in range(degrees.workers):
        spread = int(dense["dp"][rank]) * cp + int(dense["cp"][rank])
        assert divmod(spread, ep) == (int(sparse["edp"][rank]), int(sparse["ep"][rank]))
        assert (dense["pp"][rank], dense["tp"][rank]) == (sparse["pp"][rank], sparse["tp"][rank])


@given(st.integers(1, 64), SMALL, SMALL, SMALL, st.sampled_from([None, *AXES]))
def test_solve_gives_the_product_or_names_changes_that_work(workers, tensor, pipeline, data, auto):
    wanted = Degrees(tensor=tensor, pipeline=pipeline, data=data)
    try:
        found = solve(workers, auto, wanted)
    except ParallelError as error:
        message = str(error)
        fixed = {name: getattr(wanted, name) for name in AXES if name != auto}
        product = math.prod(fixed.values())
        assert workers % product if auto else product != workers
        assert f"= {product}" in message
        for name, value in re.findall(r"parallel\.(\w+)=(\d+)", message):
            assert solve(workers, auto, Degrees(**{**fixed, name: int(value)})).workers == workers
        for count in re.findall(r"(\d+) workers(?! cannot)", message.partition("; use")[2]):
            assert solve(int(count), auto, wanted).workers == int(count)
        assert "; use " in message
    else:
        assert found.workers == workers
        assert all(getattr(found, name) == getattr(wanted, name) for name in AXES if name != auto)


def test_the_experts_degree_is_checked_against_the_degree_that_auto_finds():
    assert solve(8, "data", Degrees(tensor=2, expert=1)).data == 4
    found = solve(8, "data", Degrees(tensor=2, data=4, expert=4))
    assert (found.data, found.expert) == (4, 4)
    with pytest.raises(ParallelError, match=r"should be one of 1, 2$"):
        solve(4, "data", Degrees(tensor=2, data=4, expert=4))


def _groups(rank: int) -> dict[str, tuple[int, ...]]:
    world = World(Degrees(pipeline=2, data=2, tensor=2, expert=2), rank)
    wanted = [("tp",), ("dp",), ("pp",), ("dp", "cp"), ("ep",), ("edp",), ("pp", "rep", "dp", "cp", "tp")]
    found = {"+".join(axes): world.group(*axes) for axes in wanted}
    assert all(group.rank == rank for group in found.values())
    assert found["edp"].process_group is None
    assert found["edp"].size == 1
    return {name: group.ranks for name, group in found.items()}


def test_the_groups_of_eight_ranks():
    first, *_, last = run_ranks(8, _groups)
    assert first == {
        "tp": (0, 1), "dp": (0, 2), "pp": (0, 4), "dp+cp": (0, 2), "ep": (0, 2), "edp": (0,),
        "pp+rep+dp+cp+tp": tuple(range(8)),
    }  # fmt: skip
    assert last["tp"] == (6, 7)
    assert last["dp"] == (5, 7)
    assert last["pp"] == (3, 7)


def test_a_world_refuses_what_is_not_there():
    with pytest.raises(ParallelError, match="no rank 3 among 2"):
        World(Degrees(data=2), 3)
    with pytest.raises(ParallelError, match="have to be connected first"):
        World(Degrees(data=2), 0).group("dp")
    with pytest.raises(ParallelError, match="no mesh has the axes xp"):
        World(Degrees()).group("xp")
