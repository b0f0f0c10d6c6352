"""Layouts and plans as people see them."""

from __future__ import annotations

import pytest

from resilin.layout import Flat, LayoutError, Mesh, Only, ParamSpec, Shard, layout_of, plan
from resilin.layout.picture import draw
from resilin.layout.show import drawing, in_words, places_table, plan_table, tensors_table

SPECS = {
    "up.0": ParamSpec((4, 6), "F32", (Shard("tp", 0),)),
    "up.1": ParamSpec((4, 6), "F32", (Shard("tp", 0),)),
    "down": ParamSpec((4, 6), "F32", (Only("pp", (1,)), Shard("tp", 1))),
    "norm": ParamSpec((5,), "F32", (Flat("tp"),)),
    "step": ParamSpec((), "I64"),
}
MESH = Mesh.of(pp=2, tp=2)


def test_a_drawing_shows_every_element_s_holders():
    layout = layout_of(SPECS, MESH)
    shown = drawing(layout, "up.0").splitlines()
    assert shown[0] == "up.0: F32 4x6"
    assert [line.strip() for line in shown[1:5]] == ["aaaaaa"] * 2 + ["bbbbbb"] * 2
    assert shown[5:] == ["  a rank 0, 2", "  b rank 1, 3"]
    alone = drawing(layout, "down").splitlines()
    assert [line.strip() for line in alone[1:5]] == ["222333"] * 4
    assert drawing(layout, "norm").splitlines()[1].strip() == "aaabb"
    assert "rank 0-3" in drawing(layout, "step")
    lost = layout_of(SPECS, MESH).without(layout.places[:1])
    assert drawing(lost, "up.0").splitlines()[1].strip() == "222222"
    assert ". nobody" in drawing(layout.without([layout.places[2], layout.places[3]]), "down")


def test_a_large_tensor_is_sampled():
    layout = layout_of({"w": ParamSpec((1000, 900), "F32", (Shard("tp", 0),))}, Mesh.of(tp=2))
    lines = drawing(layout, "w", rows=4, columns=8).splitlines()
    assert lines[0].endswith("sampled")
    assert [line.strip() for line in lines[1:5]] == ["0" * 8] * 2 + ["1" * 8] * 2


def test_tables_say_what_everyone_holds_and_equal_tensors_once():
    layout = layout_of(SPECS, MESH)
    tensors = tensors_table(layout).splitlines()
    assert len(tensors) == 1 + len(SPECS) - 1
    assert tensors[1].split() == ["up.0", "(+1", "alike)", "F32", "4x6", "4", "4", "2"]
    places = places_table(layout, most=2).splitlines()
    assert places[1].split()[:5] == ["rank", "0", "4", "116", "B"]
    assert places[-1].startswith("... 2 more places; ")


def test_a_plan_s_table_adds_up():
    here, there = layout_of(SPECS, MESH), layout_of(SPECS, Mesh.of(pp=2, tp=3))
    made = plan(here, there)
    shown = plan_table(made)
    assert f"{len(made):,} moves: {in_words(made.moved_bytes)} between places" in shown
    assert "senders, the busiest with" in shown
    same = plan_table(plan(here, here))
    assert "(100.0%) already there" in same
    assert "sends" not in same


def test_a_picture_is_written_for_every_kind_of_tensor(tmp_path):
    pytest.importorskip("matplotlib")
    layout = layout_of(SPECS | {"experts": ParamSpec((4, 3, 2), "F32", (Shard("tp", 0),))}, MESH)
    for ending, begins in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        path = tmp_path / f"made/layout{ending}"
        draw([("now", layout), ("then", layout)], ["up.0", "down", "norm", "step", "experts"], path)
        assert path.read_bytes().startswith(begins)
    with pytest.raises(LayoutError, match="no tensor to draw"):
        draw([("now", layout)], [], tmp_path / "none.png")


def test_bytes_in_words():
    assert [in_words(n) for n in (0, 1023, 1536, 3 << 20, 5 << 40)] == ["0 B", "1023 B", "1.5 KiB", "3 MiB", "5 TiB"]
