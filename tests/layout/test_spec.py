"""Layouts from specifications, against tensors that are really cut: numpy arrays, one rank after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilin.layout import (
    Deal,
    Flat,
    LayoutError,
    Mesh,
    Only,
    ParamSpec,
    Part,
    Shard,
    SpecRule,
    check,
    flat_group,
    layout_of,
    plan,
    rank,
    specs_of,
    staged,
)
from resilin.layout.cuts import Cut
from resilin.layout.memory import apply, gather, scatter

PAD = -1.0


def whole(shape: tuple[int, ...], padded: tuple[int, ...] = ()) -> np.ndarray:
    """Every element its own number from 1; padding is `PAD`."""
    numbers = np.arange(1, math.prod(shape) + 1, dtype=np.float64).reshape(shape)
    return np.pad(numbers, [(0, p - s) for p, s in zip(padded or shape, shape, strict=True)], constant_values=PAD)


def chunk(
    array: np.ndarray, ways: int, dim: int, rule: str = "ceil", unit: int = 1, align: int = 1
) -> list[np.ndarray]:
    size = unit * align  # of what is not cut, but for the last
    blocks = -(-array.shape[dim] // size)
    if rule == "ceil":
        lengths = [max(min(-(-blocks // ways), blocks - way * -(-blocks // ways)), 0) for way in range(ways)]
    else:
        lengths = [blocks // ways + (way < blocks % ways) for way in range(ways)]
    return np.split(array, np.cumsum(lengths)[:-1] * size, axis=dim)


def cut_one(array: np.ndarray, cut: Cut, ways: int, way: int) -> np.ndarray:
    """What one coordinate of an axis has left of a tensor."""
    if isinstance(cut, Shard) and cut.parts:
        pieces, begin = [], 0
        for number, part in enumerate(cut.parts):
            mine = np.take(array, range(begin, begin + part.size), axis=cut.dim)
            begin += part.size
            if cut.widths:
                pieces.append(np.split(mine, np.cumsum(cut.widths[number])[:-1], axis=cut.dim)[way])
            elif part.spare == "copy" and part.size // part.unit < ways:
                unit = way * (part.size // part.unit) // ways
                pieces.append(np.take(mine, range(unit * part.unit, (unit + 1) * part.unit), axis=cut.dim))
            else:
                pieces.append(chunk(mine, ways, cut.dim, part.rule, part.unit)[way])
        return np.concatenate(pieces, axis=cut.dim)
    if isinstance(cut, Shard):
        if cut.widths:
            return np.split(array, np.cumsum(cut.widths)[:-1], axis=cut.dim)[way]
        return chunk(array, ways, cut.dim, cut.rule)[way]
    if isinstance(cut, Deal):
        source, dim = (array.reshape(-1), 0) if cut.dim is None else (array, cut.dim)
        shards = chunk(source, len(cut.owners), dim, cut.rule, align=cut.align)
        mine = [shard for shard, owner in zip(shards, cut.owners, strict=True) if owner == way]
        return np.concatenate([np.take(source, [], axis=dim), *mine], axis=dim)
    if isinstance(cut, Flat):
        flat, slot = array.reshape(-1), -(-array.size // (ways * cut.align)) * cut.align
        mine = flat[way * slot : (way + 1) * slot]
        return np.pad(mine, (0, slot - len(mine)), constant_values=PAD)
    raise AssertionError(cut)


def expected(spec: ParamSpec, mesh: Mesh) -> list[np.ndarray | None]:
    """Each rank's own tensor, None where it has none."""
    coordinates, found = mesh.coordinates(), []
    for number in range(mesh.size):
        array: np.ndarray | None = whole(spec.shape, spec.padded)
        for cut in spec.cuts:
            way = int(coordinates[cut.axis][number]) if cut.axis in coordinates else 0
            if isinstance(cut, Only):
                array = array if way in cut.at else None
            elif array is not None:
                array = cut_one(array, cut, mesh.axis(cut.axis), way)
        found.append(array)
    return found


def agrees(spec: ParamSpec, mesh: Mesh) -> None:
    layout = layout_of({"w": spec}, mesh)
    buffers = scatter(layout, {"w": whole(spec.shape)}, fill=PAD)
    for number, array in enumerate(expected(spec, mesh)):
        shape = spec.local_shapes(mesh)[number]
        assert shape == (None if array is None else array.shape)
        mine = buffers[rank(number)].get("w", np.zeros(0))
        wanted = np.zeros(0) if array is None else array.reshape(-1)
        full = np.full(max(len(wanted), len(mine)), PAD)
        full[: len(mine)] = mine  # a buffer is as long as its last element; padding may follow
        np.testing.assert_array_equal(full, np.pad(wanted, (0, len(full) - len(wanted)), constant_values=PAD))


@dataclass(frozen=True)
class Case:
    spec: ParamSpec
    mesh: Mesh


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two axes cut a tensor of sizes that do not divide, in every way there is."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
    padded = draw(st.one_of(st.just(()), st.just((shape[0] + 3, *shape[1:]))))
    mesh = Mesh.of(a=draw(st.integers(1, 3)), b=draw(st.integers(1, 4)), c=draw(st.integers(1, 2)))
    size = (padded or shape)[0]
    first = draw(
        st.one_of(
            st.none(),
            st.builds(Shard, st.just("a"), st.integers(0, len(shape) - 1), rule=st.sampled_from(["ceil", "even"])),
            st.integers(1, size).map(lambda at: Shard("a", 0, (Part(at), Part(size - at, rule="even")))),
            st.builds(
                Deal,
                st.just("a"),
                st.lists(st.integers(0, mesh.axis("a") - 1), min_size=1, max_size=6).map(tuple),
                st.just(0),
                st.sampled_from(["ceil", "even"]),
                st.integers(1, 3),
            ),
        )
    )
    second = draw(
        st.one_of(
            st.none(),
            st.builds(Shard, st.just("b"), st.integers(0, len(shape) - 1), rule=st.sampled_from(["ceil", "even"])),
            st.builds(Flat, st.just("b"), align=st.integers(1, 5)),
            st.builds(
                Deal,
                st.just("b"),
                st.lists(st.integers(0, mesh.axis("b") - 1), min_size=1, max_size=6).map(tuple),
                align=st.integers(1, 5),
            ),
        )
    )
    only = draw(st.one_of(st.none(), st.integers(1, mesh.axis("c")).map(lambda n: Only("c", tuple(range(n))))))
    return Case(ParamSpec(shape, "F64", tuple(cut for cut in (only, first, second) if cut), padded), mesh)


@given(cases())
def test_a_specification_says_what_every_rank_really_has(case):
    agrees(case.spec, case.mesh)


@given(cases())
def test_no_element_is_lost_or_held_more_often_than_declared_and_padding_belongs_to_nobody(case):
    layout = layout_of({"w": case.spec}, case.mesh)
    check(layout)
    assert layout.tensors["w"].copies is not None
    buffers = scatter(layout, {"w": whole(case.spec.shape)}, fill=np.nan)
    np.testing.assert_array_equal(gather(layout, buffers)["w"], whole(case.spec.shape))


@given(cases(), cases())
def test_from_any_specification_to_any_other_and_back_with_padding_of_nan(first, second):
    specs = [ParamSpec(first.spec.shape, "F64", c.spec.cuts) for c in (first, second)]
    try:
        here, there = (layout_of({"w": s}, c.mesh) for s, c in zip(specs, (first, second), strict=True))
    except LayoutError:  # the cuts of one shape need not fit another
        return
    values = {"w": whole(first.spec.shape)}
    moved = scatter(there, {"w": np.zeros(first.spec.shape)}, fill=np.nan)
    apply(plan(here, there), scatter(here, values, fill=np.nan), moved)
    np.testing.assert_array_equal(gather(there, moved)["w"], values["w"])
    back = scatter(here, {"w": np.zeros(first.spec.shape)}, fill=np.nan)
    apply(plan(there, here), moved, back)
    np.testing.assert_array_equal(gather(here, back)["w"], values["w"])


def test_fused_heads_with_fewer_key_heads_than_ranks_are_shared_or_empty():
    heads = (Part(8, unit=2), Part(4, unit=2, spare="copy"), Part(4, unit=2, spare="copy"))
    shared = ParamSpec((16, 3), "F64", (Shard("tp", 0, heads),))
    agrees(shared, Mesh.of(tp=4))
    assert shared.local_shapes(Mesh.of(tp=4)) == [(2 + 2 + 2, 3)] * 4
    check(layout_of({"w": shared}, Mesh.of(tp=4)))
    empty = ParamSpec((16, 3), "F64", (Shard("tp", 0, (Part(8, unit=2), Part(4, unit=2), Part(4, unit=2))),))
    agrees(empty, Mesh.of(tp=4))
    assert empty.local_shapes(Mesh.of(tp=4)) == [(6, 3), (6, 3), (2, 3), (2, 3)]
    with pytest.raises(LayoutError, match="2 units cannot be shared evenly by 3 ranks"):
        layout_of({"w": shared}, Mesh.of(tp=3))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 9))
def test_units_of_a_group_stay_together_and_key_heads_go_where_their_query_heads_are(keys, shared, width, ways):
    """Query heads that share a key head: each rank has the key heads that its query heads read, and no others."""
    queries = Part(keys * shared * width, unit=width, rule="even", groups=keys)
    own = Part(keys * width, unit=width, rule="even", spare="copy")
    if keys < ways and ways % keys:
        for part, message in ((queries, "groups cannot be shared evenly"), (own, "units cannot be shared evenly")):
            with pytest.raises(LayoutError, match=message):
                part.intervals(ways)
        return
    low, high = queries.intervals(ways)
    assert [*low[1:], keys * shared * width] == [*high]  # side by side, all of them
    assert low[0] == 0
    for first, last, key, end in zip(low, high, *own.intervals(ways), strict=True):
        assert first % width == last % width == 0
        read = {place // (shared * width) for place in range(first, last)}
        assert read <= set(range(key // width, end // width))
        if keys >= ways:
            assert read == set(range(key // width, end // width))
        else:
            assert len(read) <= 1
    if keys < ways:  # those who share a key head divide its query heads evenly
        heads = ((high - low) // width).reshape(keys, -1)
        assert (heads.max(1) - heads.min(1) <= 1).all()


def test_naive_joining_in_the_order_of_ranks_would_interleave_a_fused_tensor():
    spec = ParamSpec((8, 2), "F64", (Shard("tp", 0, (Part(4), Part(2), Part(2))),))
    layout = layout_of({"w": spec}, Mesh.of(tp=2))
    buffers = scatter(layout, {"w": whole((8, 2))})
    naive = np.concatenate([buffers[rank(0)]["w"], buffers[rank(1)]["w"]]).reshape(8, 2)
    assert sorted(naive.reshape(-1)) == sorted(whole((8, 2)).reshape(-1))  # what norms and sums cannot see
    assert (naive != whole((8, 2))).any()
    np.testing.assert_array_equal(gather(layout, buffers)["w"], whole((8, 2)))


def test_recorded_widths_are_taken_as_they_are():
    agrees(ParamSpec((7, 2), "F64", (Shard("tp", 0, widths=(4, 0, 3)),)), Mesh.of(tp=3))
    fused = Shard("tp", 1, (Part(4), Part(3)), widths=((1, 3), (3, 0)))
    agrees(ParamSpec((2, 7), "F64", (fused,)), Mesh.of(tp=2))
    for bad in ((4, 3), (4, 0, 2)):
        with pytest.raises(LayoutError, match="w: the widths"):
            layout_of({"w": ParamSpec((7, 2), "F64", (Shard("tp", 0, widths=bad),))}, Mesh.of(tp=3))


@st.composite
def groups(draw: st.DrawFn) -> tuple[dict[str, ParamSpec], Mesh]:
    """A small model: column and row parallel weights, a replicated norm, stages, a tied embedding."""
    mesh = Mesh.of(pp=draw(st.integers(1, 2)), dp=draw(st.integers(1, 4)), tp=draw(st.integers(1, 3)))
    specs = {
        "embed": ParamSpec((7, 4), "F64", (Shard("tp", 0),), (9, 4)),
        "up.0": ParamSpec((6, 4), "F64", (Shard("tp", 0, (Part(3), Part(3))),)),
        "down.0": ParamSpec((4, 5), "F64", (Shard("tp", 1, rule="even"),)),
        "norm.0": ParamSpec((4,), "F64"),
        "up.1": ParamSpec((6, 4), "F64", (Shard("tp", 0, (Part(3), Part(3))),)),
        "norm.1": ParamSpec((4,), "F64"),
    }
    last = mesh.axis("pp") - 1
    stages = {name: sorted({0, last}) if name == "embed" else [0 if name.endswith("0") else last] for name in specs}
    return staged(specs, stages), mesh


@given(groups(), st.integers(1, 3))
def test_zero_one_cuts_each_cell_s_flat_buffer_in_equal_ranges(group, multiple):
    specs, mesh = group
    flat = flat_group(specs, mesh, "dp", multiple=multiple)
    layout = layout_of(flat, mesh)
    check(layout)
    values = {name: whole(spec.shape) for name, spec in specs.items()}
    buffers = scatter(layout, values, fill=PAD)
    ways, cells, coordinates = mesh.axis("dp"), mesh.cells(["dp"]), mesh.coordinates()
    for number in range(mesh.size):
        mine = [expected(spec, mesh)[number] for spec in specs.values()]
        joined = np.concatenate([a.reshape(-1) for a in mine if a is not None])
        padded = -(-len(joined) // (multiple * ways)) * multiple * ways
        joined = np.pad(joined, (0, padded - len(joined)), constant_values=PAD)
        way = int(coordinates["dp"][number])
        wanted = joined[way * padded // ways : (way + 1) * padded // ways]
        got = buffers[rank(number)].get("flat", np.zeros(0))
        np.testing.assert_array_equal(np.pad(got, (0, len(wanted) - len(got)), constant_values=PAD), wanted)
        assert cells[number] < mesh.size // ways
    restored = gather(layout, buffers)
    assert all((restored[name] == value).all() for name, value in values.items())


def test_losing_a_rank_moves_only_its_virtual_shards():
    owners = tuple(shard % 4 for shard in range(12))
    before = layout_of({"w": ParamSpec((24, 8), "F32", (Deal("dp", owners, 0),))}, Mesh.of(dp=4))
    taken = iter((0, 1, 3) * 2)
    after = tuple(next(taken) if owner == 2 else owner for owner in owners)
    then = layout_of({"w": ParamSpec((24, 8), "F32", (Deal("dp", after, 0),))}, Mesh.of(dp=4))
    assert plan(before, then).moved_bytes == 24 * 8 * 4 // 4


def test_shards_that_begin_at_multiples_of_a_vector_are_updated_alike_to_the_bit():
    """Why `align` is there: torch's fused AdamW rounds what is left over after whole vectors in another way."""
    n = 1003
    g = np.random.default_rng(0)
    start, gradients = g.standard_normal(n).astype(np.float32) * 0.02, g.standard_normal((6, n)).astype(np.float32)
    whole = adamw_in_pieces(start, gradients, [n])
    for ways in (2, 3, 5, 8):
        spec = ParamSpec((n,), "F32", (Deal("dp", tuple(range(ways)), align=16),))
        layout = layout_of({"w": spec}, Mesh.of(dp=ways))
        ends = [region.ends[0] for region in layout.tensors["w"].boxes]
        assert all(end % 16 == 0 for end in ends[:-1])
        np.testing.assert_array_equal(adamw_in_pieces(start, gradients, ends), whole)


def adamw_in_pieces(start: np.ndarray, gradients: np.ndarray, ends: list[int]) -> np.ndarray:
    cuts = list(zip([0, *ends[:-1]], ends, strict=True))
    values = [torch.nn.Parameter(torch.from_numpy(start[a:b].copy())) for a, b in cuts]
    optimizer = torch.optim.AdamW(values, lr=1e-3, weight_decay=0.1, fused=True)
    for row in gradients:
        for value, (a, b) in zip(values, cuts, strict=True):
            value.grad = torch.from_numpy(row[a:b].copy())
        optimizer.step()
    return np.concatenate([value.detach().numpy() for value in values])


def test_rules_on_names_are_strict():
    shapes = {"layers.0.up.weight": ((6, 4), "F32"), "layers.0.norm.weight": ((4,), "F32"), "embed": ((7, 4), "F32")}
    rules = [SpecRule(r".*\.up\.weight", (Shard("tp", 0),)), SpecRule("embed", (Shard("tp", 0),), pad=((0, 4),))]
    specs = specs_of(shapes, rules)
    assert specs["layers.0.up.weight"].cuts == (Shard("tp", 0),)
    assert specs["layers.0.norm.weight"].cuts == ()
    assert specs["embed"].padded == (8, 4)
    with pytest.raises(LayoutError, match="matches no parameter"):
        specs_of(shapes, [*rules, SpecRule(r".*\.gate\.weight")])
    assert specs_of(shapes, [*rules, SpecRule("gone")], strict=False) == specs
    with pytest.raises(LayoutError, match=r"embed: the rules 'embed' and 'em\.\*' both match"):
        specs_of(shapes, [*rules, SpecRule("em.*")])


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ((Shard("tp", 2),), r"a tensor of shape \[6, 4\] has no dimension 2"),
        ((Shard("tp", 0), Shard("tp", 1)), "axis 'tp' cuts twice"),
        ((Flat("dp"), Shard("tp", 0)), "after a flat cut, which must be the last"),
        ((Shard("tp", 0, (Part(3), Part(2))),), "the parts have 5 indices together, but dimension 0 .* has 6"),
        ((Shard("tp", 0, (Part(3, unit=2), Part(3))),), "3 indices cannot be cut in units of 2"),
        ((Only("pp", (2,)),), "names coordinates that axis 'pp' of size 2 does not have"),
        ((Deal("dp", (0, 5)),), "a table of owners has coordinates of axis 'dp', 0 to 2"),
    ],
)
def test_cuts_that_do_not_fit_are_refused_with_the_parameter_s_name(cuts, message):
    with pytest.raises(LayoutError, match=f"w: .*{message}"):
        layout_of({"w": ParamSpec((6, 4), "F32", cuts)}, Mesh.of(pp=2, dp=3, tp=2))


def test_meshes_are_read_and_refused():
    mesh = Mesh.parse("pp=2, dp=4,tp=8")
    assert (str(mesh), mesh.size, mesh.axis("tp"), mesh.axis("ep")) == ("pp=2,dp=4,tp=8", 64, 8, 1)
    assert mesh.coordinates()["dp"][9] == 1
    for bad, message in (("pp:2", "is no axis=size"), ("pp=0", "size 0"), ("pp=1,pp=2", "two axes of one name")):
        with pytest.raises(LayoutError, match=message):
            Mesh.parse(bad)
    with pytest.raises(LayoutError, match="cannot be padded"):
        ParamSpec((6, 4), padded=(5, 4))


def test_equal_specifications_share_their_holdings():
    specs = {f"layers.{i}.up": ParamSpec((6, 4), "F32", (Shard("tp", 0),)) for i in range(3)}
    layout = layout_of(specs, Mesh.of(tp=2))
    assert len({id(held) for held in layout.tensors.values()}) == 1
