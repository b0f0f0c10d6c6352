"""Which tensors differ, by how much, and where: first and worst position, in any layouts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import as_ranks

from resilin.checkpoint import diff
from resilin.checkpoint.diff import Other, ValuesDiffer, differences
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.tensor_record import DTYPES
from resilin.layout import Layout, Region, rank


def saved(path: Path, tree: dict[str, Any]) -> Path:
    folder = CheckpointFolder(path)
    folder.save(1, tree)
    folder.close()
    at: Path = folder.step_path(1)
    return at


def test_equal_states_do_not_differ(tmp_path: Path) -> None:
    tree = {"m": {"w": torch.tensor([1.0, math.nan]), "t": torch.ones(2)}, "run": {"best": math.nan, "names": ["a"]}}
    assert list(differences(saved(tmp_path / "a", tree), saved(tmp_path / "b", tree))) == []


def test_a_permutation_is_seen_though_every_norm_is_the_same(tmp_path: Path) -> None:
    w = torch.arange(24.0).reshape(4, 6)
    swapped = w.clone()
    swapped[[1, 3]] = w[[3, 1]]
    (found,) = differences(saved(tmp_path / "a", {"m": {"w": w}}), saved(tmp_path / "b", {"m": {"w": swapped}}))
    assert found == ValuesDiffer("m/w", (4, 6), 12, (1, 0), (1, 0), (6.0, 18.0), 12.0)
    assert str(found) == (
        "m/w [4, 6]: 12 of 24 elements differ, the first at [1, 0]; most at [1, 0], by 12: 6.0 and 18.0"
    )


@given(data=st.data(), shape=st.lists(st.integers(1, 6), max_size=3).map(tuple), slab=st.sampled_from([4, 20, 1 << 20]))
@settings(max_examples=60, deadline=None)
def test_first_and_worst_are_what_numpy_finds(
    tmp_path_factory: pytest.TempPathFactory, data: Any, shape: tuple[int, ...], slab: int
) -> None:
    a = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    b = a.copy()
    for flat in data.draw(st.lists(st.integers(0, a.size - 1), max_size=5)):
        b.reshape(-1)[flat] += data.draw(st.sampled_from([1.0, -7.0, 0.5]))
    at = tmp_path_factory.mktemp("diff")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diff, "_BYTES", slab)
        found = list(
            differences(
                saved(at / "a", {"w": {"x": torch.from_numpy(a)}}), saved(at / "b", {"w": {"x": torch.from_numpy(b)}})
            )
        )
    places = np.argwhere(a != b)
    if not len(places):
        assert found == []
        return
    (one,) = found
    assert isinstance(one, ValuesDiffer)
    worst = np.unravel_index(int(np.abs(a - b).argmax()), shape)
    assert (one.count, one.first) == (len(places), tuple(places[0].tolist()))
    assert one.worst == tuple(int(i) for i in worst)
    assert one.largest == float(np.abs(a - b).max())


def test_not_a_number_and_signs_of_zero_are_differences(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", {"m": {"w": torch.tensor([0.0, 1.0, math.nan, 4.0])}})
    b = saved(tmp_path / "b", {"m": {"w": torch.tensor([-0.0, math.nan, math.nan, 4.0])}})
    (found,) = differences(a, b)
    assert isinstance(found, ValuesDiffer)
    assert (found.count, found.first, found.worst, found.largest) == (2, (0,), (1,), math.inf)
    (found,) = differences(a, b, tolerance=0.1)
    assert isinstance(found, ValuesDiffer)
    assert (found.count, found.first) == (1, (1,))


def test_a_tolerance_lets_small_differences_pass(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", {"m": {"w": torch.tensor([1.0, 2.0])}})
    b = saved(tmp_path / "b", {"m": {"w": torch.tensor([1.0, 2.25])}})
    assert list(differences(a, b, tolerance=0.25)) == []
    assert len(list(differences(a, b, tolerance=0.2))) == 1


def test_everything_else_that_differs_is_told(tmp_path: Path) -> None:
    x = torch.ones(2)
    a = saved(tmp_path / "a", {"m": {"w": x, "gone": x, "s": torch.ones(3), "k": x}, "run": {"lr": 0.1, "same": 1}})
    b = saved(
        tmp_path / "b", {"m": {"w": x.double(), "s": torch.ones(4), "new": x, "k": 3}, "run": {"lr": 0.2, "same": 1}}
    )
    assert [(one.name, one.words) for one in differences(a, b) if isinstance(one, Other)] == [
        ("m/w", "F32 [2] and F64 [2]"),
        ("m/gone", f"only in {a}"),
        ("m/s", "F32 [3] and F32 [4]"),
        ("m/k", f"a tensor in {a}, a value in the other"),
        ("run/lr", "0.1 and 0.2"),
        ("m/new", f"only in {b}"),
    ]
    assert [one.name for one in differences(a, b, parts=["run"])] == ["run/lr"]


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_type_can_be_compared(tmp_path: Path, name: str) -> None:
    raw = torch.zeros(4, 16, dtype=torch.uint8)
    other = raw.clone()
    other[2, 8] = 1
    dtype = DTYPES[name]
    trees = [{"m": {"w": data.bool() if dtype == torch.bool else data.view(dtype)}} for data in (raw, other)]
    (found,) = differences(saved(tmp_path / "a", trees[0]), saved(tmp_path / "b", trees[1]))
    assert isinstance(found, ValuesDiffer)
    assert (found.count, found.first) == (1, (2, 8 // dtype.itemsize))


def test_layouts_do_not_matter(tmp_path: Path) -> None:
    w = torch.arange(24.0).reshape(8, 3)
    layout = Layout.of({"m/w": ((8, 3), "F32")}, [("m/w", rank(r), Region((2 * r, 0), (2, 3))) for r in range(4)])

    def work(c: Any) -> None:
        CheckpointFolder(tmp_path / "ranks", coordinator=c).save(1, {"m": {"w": w[2 * c.rank :][:2]}}, layout)

    as_ranks(4, work)
    ranks = CheckpointFolder(tmp_path / "ranks").step_path(1)
    assert list(differences(saved(tmp_path / "one", {"m": {"w": w}}), ranks)) == []
    changed = w.clone()
    changed[5, 1] = 0
    (found,) = differences(ranks, saved(tmp_path / "two", {"m": {"w": changed}}))
    assert isinstance(found, ValuesDiffer)
    assert (found.first, found.values) == ((5, 1), (16.0, 0.0))
