"""The same memory under other names, against numpy's own slicing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import layouts

from resilin.layout import Layout, LayoutError, ParamSpec, Part, Shard, check, layout_of, named, plan
from resilin.layout.memory import apply, gather, scatter
from resilin.layout.mesh import Mesh
from resilin.layout.views import join, pick, stack, unstack


@given(st.data())
def test_picked_runs_are_slices_side_by_side(data):
    shape = (5, 6)
    layout = named(data.draw(layouts({"w": shape})))
    values = np.arange(30.0).reshape(shape)
    dim = data.draw(st.integers(0, 1))
    cuts = data.draw(st.lists(st.integers(0, shape[dim]), min_size=2, max_size=6, unique=True).map(sorted))
    runs = data.draw(st.permutations([(low, high - low) for low, high in itertools.pairwise(cuts)]))
    seen = Layout(layout.places, {"v": pick(layout.tensors["w"], dim, runs)}, layout.buffers)
    check(seen)
    wanted = np.concatenate([np.take(values, range(low, low + n), axis=dim) for low, n in runs], axis=dim)
    np.testing.assert_array_equal(gather(seen, scatter(layout, {"w": values}))["v"], wanted)


@given(st.data())
def test_joined_and_stacked_tensors_are_concatenated_and_stacked_ones(data):
    shapes = {"a": (3, 4), "b": (3, 4), "c": (3, 4)}
    layout = named(data.draw(layouts(shapes)))
    g = np.random.default_rng(0)
    values = {name: g.standard_normal(shape) for name, shape in shapes.items()}
    parts, buffers = list(layout.tensors.values()), scatter(layout, values)
    seen = Layout(
        layout.places, {"rows": join(parts, 0), "columns": join(parts, 1), "stack": stack(parts)}, layout.buffers
    )
    check(seen)
    got = gather(seen, buffers)
    np.testing.assert_array_equal(got["rows"], np.concatenate(list(values.values()), axis=0))
    np.testing.assert_array_equal(got["columns"], np.concatenate(list(values.values()), axis=1))
    np.testing.assert_array_equal(got["stack"], np.stack(list(values.values())))
    again = Layout(layout.places, dict(zip("abc", unstack(seen.tensors["stack"]), strict=True)), layout.buffers)
    for name, value in gather(again, buffers).items():
        np.testing.assert_array_equal(value, values[name])


def test_interleaved_heads_of_one_mesh_become_separate_projections_of_another():
    groups, size, hidden = 4, 2, 5  # of each group: two query heads, one key head, one value head
    per = (2 + 1 + 1) * size
    fused = layout_of({"qkv": ParamSpec((groups * per, hidden), "F64", (Shard("tp", 0),))}, Mesh.of(tp=2))
    fused = named(fused)
    spans = {"q": (0, 2 * size), "k": (2 * size, size), "v": (3 * size, size)}
    views = {
        name: pick(fused.tensors["qkv"], 0, [(g * per + first, count) for g in range(groups)])
        for name, (first, count) in spans.items()
    }
    separate = Layout(fused.places, views, fused.buffers)
    value = np.random.default_rng(0).standard_normal((groups * per, hidden))
    by_group = value.reshape(groups, per, hidden)
    wanted = {n: by_group[:, f : f + c].reshape(-1, hidden) for n, (f, c) in spans.items()}
    target = layout_of({n: ParamSpec(w.shape, "F64", (Shard("tp", 0),)) for n, w in wanted.items()}, Mesh.of(tp=3))
    buffers = scatter(target, {n: np.zeros_like(w) for n, w in wanted.items()})
    apply(plan(separate, target), scatter(fused, {"qkv": value}), buffers)
    for name, got in gather(target, buffers).items():
        np.testing.assert_array_equal(got, wanted[name])


def test_a_fused_projection_is_read_as_three_and_written_as_one():
    spec = ParamSpec((8, 3), "F64", (Shard("tp", 0, (Part(4), Part(2), Part(2))),))
    fused = named(layout_of({"qkv": spec}, Mesh.of(tp=2)))
    held = fused.tensors["qkv"]
    parts = {"q": pick(held, 0, [(0, 4)]), "k": pick(held, 0, [(4, 2)]), "v": pick(held, 0, [(6, 2)])}
    value = np.arange(24.0).reshape(8, 3)
    got = gather(Layout(fused.places, parts, fused.buffers), scatter(fused, {"qkv": value}))
    np.testing.assert_array_equal(np.concatenate([got["q"], got["k"], got["v"]]), value)
    again = join(list(parts.values()), 0)
    assert sorted(again.boxes) == sorted(held.boxes)


def test_what_does_not_fit_is_refused():
    layout = layout_of({"a": ParamSpec((3, 4)), "b": ParamSpec((3, 5))}, Mesh.of(tp=1))
    a, b = layout.tensors["a"], layout.tensors["b"]
    with pytest.raises(LayoutError, match="cannot be joined in dimension 0"):
        join([a, b], 0)
    with pytest.raises(LayoutError, match="name the buffers first"):
        join([a, a], 0)
    with pytest.raises(LayoutError, match="do not lie in dimension 1"):
        pick(a, 1, [(2, 3)])
