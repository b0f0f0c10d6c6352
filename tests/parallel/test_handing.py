"""Gradients that follow their parameters to other ranks: the sums are those of one process, to the bit."""

from __future__ import annotations

import pytest
import torch
from forked import run_ranks

from resilin.parallel import handing
from resilin.parallel.canonical import TreeSum
from resilin.parallel.degrees import Degrees
from resilin.parallel.handing import Handing, Moved
from resilin.parallel.world import World

SIZES = {"a": 23, "b": 8, "never": 5}
MICROS = 6
HAD = {0: [0, 1, 2, 3], 1: [4, 5]}  # ranks 0 and 1 have computed, 2 to 4 own
BLOCKS = {0: [(0, 2)], 1: [(4, 1)]}
OWNED = {2: [(0, 3), (11, 20)], 3: [(3, 11)], 4: [(20, 23)]}


def gradients(name: str) -> list[torch.Tensor]:
    """Of every micro-batch; orders of magnitude apart, so that any other order of additions is seen."""
    draw = torch.Generator().manual_seed(len(name))
    return [10.0 ** (micro % 4) * torch.randn(SIZES[name], generator=draw) for micro in range(MICROS)]


def summed(leaves: list[torch.Tensor], first: int = 0) -> list[torch.Tensor]:
    tree = TreeSum(first)
    for leaf in leaves:
        tree.push([leaf.clone()])
    return [node.sum[0] for node in tree.nodes()]


def takers(name: str) -> dict[int, list[tuple[int, int]]]:
    cut = {rank: [(b, min(e, SIZES[name])) for b, e in runs if b < SIZES[name]] for rank, runs in OWNED.items()}
    return cut if name == "a" else {2: [], 3: [(0, SIZES[name])], 4: []}


def hand(rank: int, bucket: int) -> None:
    handing.BUCKET = bucket
    moved = [Moved(name, BLOCKS, takers(name), size) for name, size in SIZES.items()]
    had = HAD.get(rank, [0])
    mine = [
        summed([gradients(name)[micro] for micro in had], had[0]) if name != "never" else [None] * len(BLOCKS[rank])
        for name in (SIZES if rank in HAD else ())
    ] or [[]] * len(SIZES)
    sums = {name: [torch.zeros(e - b) for b, e in takers(name).get(rank, ())] for name in SIZES}
    one = Handing(3, World(Degrees(data=5), rank).everyone, moved, mine, torch.empty(0))
    one.go(lambda name: sums[name])
    assert one.used == [name for name in ("a", "b") if takers(name).get(rank)], "nobody has a gradient of the third"
    for name in ("a", "b"):
        tree = TreeSum()
        for leaf in gradients(name):
            tree.push([leaf])
        (expected,) = tree.total()
        for (begin, end), part in zip(takers(name).get(rank, ()), sums[name], strict=True):
            assert torch.equal(part, expected[begin:end])


@pytest.mark.parametrize("bucket", [1, 1 << 20], ids=["one by one", "together"])
def test_owners_elsewhere_have_the_sums_of_one_process(bucket: int):
    run_ranks(5, hand, bucket)
