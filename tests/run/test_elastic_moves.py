"""Which gradients follow blocks to another stage."""

from __future__ import annotations

from dataclasses import replace

from resilin.cluster.changes import gaining
from resilin.cluster.protocol.kept import all_is_kept, kept_by
from resilin.cluster.protocol.messages import Adopt, Halted
from resilin.cluster.view import Stage, View
from resilin.cluster.view_blueprint import ViewBlueprint
from resilin.layout import ParamSpec
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.degrees import Degrees
from resilin.run.elastic_dealing import Dealing
from resilin.run.elastic_moves import moved_between

VIEW = View(3, (Stage((5, 1), (5, 1, 1)), Stage((2,), (2, 2, 2))), dict.fromkeys((5, 1, 2), "here"), (0, 2, 3))
AFTER = replace(VIEW, epoch=4, layers=(0, 1, 3))
NAMES = tuple(f"blocks.{number}.weight" for number in range(3))


def blueprint(view: View) -> ViewBlueprint:
    specs = {name: ParamSpec((9,), "F32") for name in NAMES}
    holders = {
        name: (next(s for s in range(2) if view.layers[s] <= n < view.layers[s + 1]),) for n, name in enumerate(NAMES)
    }
    return ViewBlueprint(Blueprint(Degrees(), specs, NAMES, frozenset()), view, holders)


def test_only_what_has_another_stage_moves_from_all_who_had_it_to_all_who_own_it():
    (moved,) = moved_between(blueprint(VIEW), blueprint(AFTER), {5: (0, 1), 1: (2, 3, 4), 2: (0, 1, 2, 3, 4)})
    assert (moved.name, moved.size) == ("blocks.1.weight", 9)
    assert moved.givers == {0: [(0, 1)], 1: [(2, 1), (4, 0)]}
    assert moved.takers == {2: [(0, 9)]}
    assert moved_between(blueprint(VIEW), blueprint(VIEW), {}) == []


def test_blocks_move_in_the_middle_of_a_step_only_if_all_of_it_is_computed():
    def all_kept(lacks: int, of: int) -> bool:
        had = {5: (0, 1), 1: (2, 3), 2: (0, 1, 2, 3)}
        told = {n: Halted(3, "", 7, 7, (), tuple(m for m in mine if m != lacks), (of, 2)) for n, mine in had.items()}
        kept = kept_by(VIEW, VIEW, told, 7)
        return all_is_kept(VIEW, kept, told)

    assert all_kept(-1, 4)
    assert not all_kept(3, 4)
    assert not all_kept(-1, 5)


def test_of_a_stage_whose_members_change_all_gradients_go_to_who_owns_them_now():
    after = replace(VIEW, epoch=4, stages=(Stage((5,), (5, 5, 5)), Stage((2, 1), (2, 1, 2))))
    moved = {one.name: one for one in moved_between(blueprint(VIEW), blueprint(after), {5: (0,), 1: (1,), 2: (0, 1)})}
    assert set(moved) == set(NAMES)
    assert (moved[NAMES[0]].givers, moved[NAMES[0]].takers) == ({0: [(0, 0)], 2: [(1, 0)]}, {0: [(0, 9)]})
    assert moved[NAMES[2]].givers == {1: [(0, 1)]}
    assert set(moved[NAMES[2]].takers) == {1, 2}
    adopt = Adopt(after, VIEW, 7, {}, {5: (0,), 1: (1,), 2: (0, 1)}, handed=True)
    assert Dealing(adopt).of_step(7, 2) == [(), (), ()], "nobody computes anything again"
    assert Dealing(adopt).of_step(8, 2) == [(0, 1), (0,), (1,)]
    assert set(gaining(VIEW, after)) == {5, 1}
