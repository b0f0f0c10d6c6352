"""Saved in any layout, loaded in any other: the state is the same to the bit, and so are the consolidated bytes."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_strategies import layouts
from ranks import as_ranks, outcomes

from resilin.checkpoint.consolidate import consolidate
from resilin.checkpoint.coordinator import Threads
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.load import load_part
from resilin.checkpoint.reader import CheckpointReader
from resilin.checkpoint.verify import damages
from resilin.layout import Layout, Place, Region, rank
from resilin.layout.memory import gather, scatter

SHAPES = {
    "model/w": (6, 5),
    "model/b": (7,),
    "model/s": (),
    "optimizer/w/exp_avg": (6, 5),
    "optimizer/t": (3, 2, 4),
}
WORLD = 5
VALUES = {"run": {"step": 3, "best": math.nan}}


def values() -> dict[str, np.ndarray]:
    g = np.random.default_rng(0)
    return {name: g.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    return tree


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, item in tree.items() for k, v in flat(item, f"{path}/{key}" if path else key).items()}
    return {path: tree}


def whole_tree() -> dict[str, Any]:
    return nested(values()) | VALUES


def spread(layout: Layout) -> Layout:
    """The same regions, with every buffer full of holes: each element has padding before and after it."""
    made = {n: replace(h, starts=h.starts * 3 + 1, strides=h.strides * 3) for n, h in layout.tensors.items()}
    return Layout(layout.places, made, layout.buffers)


def save(path: Path, layout: Layout, world: int = WORLD, fill: float = math.nan) -> None:
    buffers = scatter(layout, values(), fill)

    def work(coordinator: Threads) -> None:
        mine = buffers.get(rank(coordinator.rank), {})
        # A rank that holds nothing of a tensor has no buffer for it; 0-d tensors are 0-d at every rank.
        tree = nested(mine) | VALUES
        CheckpointFolder(path, coordinator=coordinator).save(3, tree, layout)

    as_ranks(world, work)


def folder_hash(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process alone writes, its keys in alphabetical order."""
    at = tmp_path_factory.mktemp("alone")
    folder = CheckpointFolder(at)
    folder.save(3, whole_tree())
    folder.close()
    return folder_hash(consolidate(folder.step_path(3), at / "again").path)


def test_one_process_writes_canonical_files_at_once(tmp_path: Path, canonical: dict[str, str]) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(3, whole_tree())
    alone = folder_hash(folder.step_path(3))
    assert set(alone) == {"model.safetensors", "optimizer.safetensors", "index.json"}
    assert {k: v for k, v in alone.items() if k != "index.json"} == {
        k: v for k, v in canonical.items() if k != "index.json"
    }


@given(st.data(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_layout_gives_the_same_state_and_the_same_consolidated_bytes(
    canonical: dict[str, str], same_bits: Callable[[Any, Any], bool], data: Any, tangled: bool, holes: bool
) -> None:
    layout = data.draw(layouts(SHAPES, places=WORLD, tangled=tangled))
    layout = spread(layout) if holes else layout
    with TemporaryDirectory() as at:
        save(Path(at) / "sharded", layout)
        folder = CheckpointFolder(Path(at) / "sharded")
        loaded = folder.load(3)
        assert {k: v.tobytes() for k, v in values().items()} == {
            k: np.asarray(v).tobytes() for k, v in flat(loaded).items() if isinstance(v, torch.Tensor)
        }
        assert math.isnan(loaded["run"].pop("best"))
        assert loaded["run"] == {"step": 3}
        assert folder_hash(consolidate(folder.step_path(3), Path(at) / "whole").path) == canonical


@given(st.data(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_through_files_from_one_layout_to_another_and_back_is_the_identity(data: Any, holes: bool) -> None:
    first = data.draw(layouts(SHAPES, places=WORLD, tangled=True))
    second = data.draw(layouts(SHAPES, places=3))
    if holes:
        first, second = spread(first), spread(second)
    with TemporaryDirectory() as at:
        save(Path(at) / "first", first)
        there = loaded_buffers(Path(at) / "first", second)
        for array in (a for mine in there.values() for a in mine.values()):
            assert not np.isnan(array).any()  # what was padding at the source is nowhere
        assert_same(gather(second, there), values())

        def resave(coordinator: Threads) -> None:
            tree = nested(there.get(rank(coordinator.rank), {})) | VALUES
            CheckpointFolder(Path(at) / "second", coordinator=coordinator).save(3, tree, second)

        as_ranks(3, resave)
        assert_same(gather(first, loaded_buffers(Path(at) / "second", first)), values())


def loaded_buffers(path: Path, layout: Layout) -> dict[Place, dict[str, np.ndarray]]:
    at = CheckpointFolder(path).step_path(3)
    found = {}
    for place in layout.places:
        tree = load_part(at, layout, place).tree
        tensors = {name: t for name, t in flat(tree).items() if isinstance(t, torch.Tensor)}
        found[place] = {name: t.numpy().reshape(-1) for name, t in tensors.items() if t.numel()}
    return found


def assert_same(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_element_is_in_exactly_one_piece(data: Any) -> None:
    layout = data.draw(layouts(SHAPES, places=WORLD, tangled=True))
    with TemporaryDirectory() as at:
        save(Path(at), layout)
        with CheckpointReader(CheckpointFolder(Path(at)).step_path(3)) as saved:
            for name, shape in SHAPES.items():
                record = saved.record(name)
                seen = np.zeros(shape, dtype=int)
                for region in record.boxes:
                    seen[region.slices] += 1
                assert (seen == 1).all()
                assert sum(int(n) for n in record.boxes.numel) == math.prod(shape)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_region_of_any_tensor_can_be_read_alone(data: Any) -> None:
    from layout_strategies import regions

    layout = data.draw(layouts(SHAPES, places=WORLD))
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    region = data.draw(regions(SHAPES[name]))
    with TemporaryDirectory() as at:
        save(Path(at), layout)
        with CheckpointReader(CheckpointFolder(Path(at)).step_path(3)) as saved:
            for verify in (True, False):
                read = saved.tensor(name, region=region, verify=verify)
                np.testing.assert_array_equal(read.numpy(), values()[name][region.slices])


def rows(shape: tuple[int, int], world: int) -> list[tuple[str, Place, Region]]:
    cuts = [number * shape[0] // world for number in range(world + 1)]
    return [
        ("model/w", rank(n), Region((low, 0), (high - low, shape[1])))
        for n, (low, high) in enumerate(itertools.pairwise(cuts))
    ]


def test_ranks_write_files_of_their_own_that_say_what_they_hold(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    layout = Layout.of({"model/w": ((6, 5), "F32")}, rows((6, 5), 3))
    weights = torch.arange(30.0).reshape(6, 5)

    def work(coordinator: Threads) -> None:
        tree = {"model": {"w": weights[2 * coordinator.rank :][:2]}}
        CheckpointFolder(tmp_path, coordinator=coordinator).save(1, tree, layout)

    as_ranks(3, work)
    at = CheckpointFolder(tmp_path).step_path(1)
    assert sorted(file.name for file in at.glob("*.safetensors")) == [
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    assert torch.equal(load_file(at / "model-00002-of-00003.safetensors")["w~[2:4,0:5]"], weights[2:4])


def test_what_all_ranks_hold_is_written_once_and_in_equal_shares(tmp_path: Path) -> None:
    size = 1 << 19
    whole = Region((0,), (size,))
    layout = Layout.of(
        {f"m/{n}": ((size,), "F32") for n in "ab"}, [(f"m/{n}", rank(r), whole) for n in "ab" for r in range(4)]
    )
    tree = {"m": {n: torch.randn(size) for n in "ab"}}
    as_ranks(4, lambda c: CheckpointFolder(tmp_path, coordinator=c).save(1, tree, layout))
    at = CheckpointFolder(tmp_path).step_path(1)
    sizes = [file.stat().st_size for file in at.glob("*.safetensors")]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) < 1024
    assert sum(sizes) < 2 * 4 * size + 4096


# -- ranks that do not agree ------------------------------------------------------------------------------------


def refused(path: Path, world: int, work: Callable[[Threads], Any], words: str) -> None:
    errors = outcomes(world, work)
    assert all(isinstance(error, CheckpointError) for error in errors), errors
    assert any(re.search(words, str(error)) for error in errors), errors
    assert CheckpointFolder(path).steps() == []
    assert not list(path.glob(".saving*"))


HALVES = Layout.of({"model/w": ((6, 5), "F32")}, rows((6, 5), 2))


def half(coordinator: Threads, **more: Any) -> dict[str, Any]:
    return {"model": {"w": torch.ones(3, 5)}, **more}


def test_a_rank_that_fails_fails_all_and_nothing_is_committed(tmp_path: Path) -> None:
    def work(c: Threads) -> None:
        tree = half(c) if c.rank == 0 else {"model": {"w": torch.ones(2, 5)}}
        CheckpointFolder(tmp_path, coordinator=c).save(1, tree, HALVES)

    refused(tmp_path, 2, work, r"tensor 'model/w': the layout says that elements 0 to 14 .* the buffer has 10")


def test_ranks_with_other_values_or_layouts_are_refused_by_name(tmp_path: Path) -> None:
    def saves(tree: Callable[[Threads], Any], layout: Callable[[Threads], Layout] = lambda _: HALVES) -> Any:
        return lambda c: CheckpointFolder(tmp_path, coordinator=c).save(1, tree(c), layout(c))

    refused(
        tmp_path,
        2,
        saves(lambda c: half(c, run={"lr": c.rank})),
        r"state 'run/lr': rank 1 has 1, and a rank before it 0",
    )
    refused(
        tmp_path,
        2,
        saves(lambda c: half(c, s=torch.tensor(float(c.rank)))),
        r"tensor 's' has no dimensions.*ranks 0 and 1",
    )
    other = Layout.of({"model/w": ((6, 5), "F32")}, [*rows((6, 5), 2), ("model/w", rank(0), Region((4, 0), (1, 1)))])
    refused(tmp_path, 2, saves(half, lambda c: (HALVES, other)[c.rank]), "do not agree on the layout")


def test_what_no_layout_knows_is_refused_by_name(tmp_path: Path) -> None:
    def work(c: Threads) -> None:
        tree = half(c, optimizer={"w": {"row_factor": torch.ones(3)}})
        CheckpointFolder(tmp_path, coordinator=c).save(1, tree, HALVES)

    refused(tmp_path, 2, work, r"tensor 'optimizer/w/row_factor' is not in the layout, so nobody knows which part")


def test_a_layout_with_missing_or_doubled_fragments_is_refused_by_name(tmp_path: Path) -> None:
    halves = rows((6, 5), 2)
    for held, words in (
        (halves[:1], r"tensor 'model/w' \[6, 5\]: no place holds \[3:6, 0:5\]"),
        ([*halves, halves[0]], r"'model/w' \[6, 5\]: declared to be held 1 times.*missing or doubled"),
    ):
        layout = Layout.of({"model/w": ((6, 5), "F32")}, held, copies=1)
        refused(
            tmp_path, 2, lambda c, lay=layout: CheckpointFolder(tmp_path, coordinator=c).save(1, half(c), lay), words
        )


def test_a_scalar_of_every_rank_is_written_once(tmp_path: Path) -> None:
    def work(c: Threads) -> None:
        CheckpointFolder(tmp_path, coordinator=c).save(1, half(c, optimizer={"step": torch.tensor(4.0)}), HALVES)

    as_ranks(2, work)
    folder = CheckpointFolder(tmp_path)
    assert float(folder.load(1)["optimizer"]["step"]) == 4
    for number in range(2):
        part = load_part(folder.step_path(1), HALVES, rank(number)).tree
        assert part["optimizer"]["step"].shape == ()
        assert part["model"]["w"].shape == (3, 5)


def test_a_layout_that_does_not_fit_the_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"model": {"w": torch.ones(6, 5)}})
    at = folder.step_path(1)
    wide = Layout.of({"model/w": ((6, 6), "F32")}, rows((6, 6), 2))
    with pytest.raises(CheckpointError, match=r"'model/w' has shape \[6, 5\], but the layout wants \[6, 6\]"):
        load_part(at, wide, rank(0))
    more = Layout.of({"model/w": ((6, 5), "F32"), "model/v": ((2,), "F32")}, rows((6, 5), 2))
    with pytest.raises(CheckpointError, match=r"holds no tensor 'model/v', which the layout wants"):
        load_part(at, more, rank(0))
    with pytest.raises(CheckpointError, match=r"holds tensor 'model/w', which is not in the layout"):
        load_part(at, Layout.of({}, []), rank(0))


def test_a_missing_shard_is_named_and_parts_that_do_not_need_it_load(tmp_path: Path) -> None:
    weights = torch.arange(30.0).reshape(6, 5)

    def work(c: Threads) -> None:
        tree = {"model": {"w": weights[3 * c.rank :][:3]}}
        CheckpointFolder(tmp_path, coordinator=c).save(1, tree, HALVES)

    as_ranks(2, work)
    folder = CheckpointFolder(tmp_path)
    at = folder.step_path(1)
    (at / "model-00002-of-00002.safetensors").unlink()
    missing = r"model-00002-of-00002.safetensors: the file is missing"
    with pytest.raises(CheckpointError, match=missing):
        folder.load(1)
    with pytest.raises(CheckpointError, match=missing):
        load_part(at, HALVES, rank(1))
    assert [words for words in damages(at) if re.search(missing, words)] == list(damages(at))
    assert torch.equal(load_part(at, HALVES, rank(0)).tree["model"]["w"], weights[:3])  # it opens its own file only
    assert list(folder.damaged()) == [1]


def test_what_a_tree_is_loaded_like_must_be_in_the_checkpoint(tmp_path: Path) -> None:
    folder, w = CheckpointFolder(tmp_path), torch.ones(4, 2)
    folder.save(1, {"m": {"a": w, "b": w * 2, "list": [w * 3]}, "run": {"step": 7, "best": math.nan}})
    found = folder.load_like(1, {"m": {"b": torch.zeros(4, 2), "list": [torch.zeros(4, 2)]}, "run": {"best": 0.0}})
    assert torch.equal(found["m"]["b"], w * 2)
    assert torch.equal(found["m"]["list"][0], w * 3)
    assert math.isnan(found["run"]["best"])
    for like, words in (
        ({"m": {"c": w}}, r"has no 'm/c', which is wanted"),
        ({"m": {"a": torch.ones(4, 3)}}, r"tensor 'm/a' has shape \[4, 2\], but \[4, 3\] is wanted"),
        ({"run": {"step": w}}, r"has no tensor at 'run/step', where one is wanted"),
        ({"m": {"a": w, "b": w}}, r"'m/b' and 'm/a' are one tensor here, but two in the checkpoint"),
        ({"m": {"list": [w.clone(), w.clone()]}}, r"a list of 2 at 'm/list' is wanted, and it has 1"),
    ):
        with pytest.raises(CheckpointError, match=words):
            folder.load_like(1, like)
