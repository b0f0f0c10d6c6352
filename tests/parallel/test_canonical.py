"""The canonical reduction: one order of additions, however the leaves are split."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resilin.parallel.canonical import GradientSum, TreeSum, blocks_of, tree_sum


def reference(leaves: list[torch.Tensor]) -> torch.Tensor:
    """The definition, level by level: neighbours are added, a lone last node moves up."""
    while len(leaves) > 1:
        pairs = [leaves[i] + leaves[i + 1] for i in range(0, len(leaves) - 1, 2)]
        leaves = pairs + ([leaves[-1]] if len(leaves) % 2 else [])
    return leaves[0]


def random_leaves(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Magnitudes over eight decades: any other order of additions would show.
    return [
        torch.randn(64, generator=generator) * 10.0 ** (4 * torch.rand(64, generator=generator)) for _ in range(count)
    ]


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


@given(count=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_streaming_sum_is_the_level_by_level_tree_to_the_bit(count: int, seed: int) -> None:
    leaves = random_leaves(count, seed)
    assert digest(tree_sum(leaves)) == digest(reference(leaves))


def test_the_tree_is_not_the_running_sum() -> None:
    leaves = random_leaves(16, 3)
    running = leaves[0].clone()
    for leaf in leaves[1:]:
        running += leaf
    assert digest(tree_sum(leaves)) != digest(running)


@given(levels=st.integers(1, 5), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_split_into_aligned_blocks_gives_the_same_bits(levels: int, seed: int, data: st.DataObject) -> None:
    leaves = random_leaves(2**levels, seed)
    whole = digest(tree_sum(leaves))
    combined, start = TreeSum(), 0
    while start < len(leaves):
        aligned = (start & -start).bit_length() - 1 if start else levels
        room = (len(leaves) - start).bit_length() - 1
        height = data.draw(st.integers(0, min(aligned, room)))
        combined.push([tree_sum(leaves[start : start + 2**height])], height)
        start += 2**height
    (total,) = combined.total()
    assert total is not None
    assert digest(total) == whole


def test_a_block_that_is_not_aligned_is_refused() -> None:
    tree = TreeSum()
    tree.push([torch.ones(1)])
    with pytest.raises(ValueError, match="not aligned"):
        tree.push([torch.ones(1)], height=1)


@given(count=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_gradients_of_micro_batches_are_added_in_the_order_of_the_tree(count: int) -> None:
    torch.manual_seed(count)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    inputs = [torch.randn(4, 8) * 100 for _ in range(count)]
    leaves = []
    for x in inputs:
        model.zero_grad()
        model(x).sum().backward()
        leaves.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    parameters = list(model.parameters())
    total = GradientSum(parameters, count)
    for x in inputs:
        model(x).sum().backward()
        total.collect()
    grads = total.finish()
    for index, grad in enumerate(grads):
        assert digest(grad) == digest(reference([leaf[index] for leaf in leaves]))


def test_parameters_that_some_micro_batches_do_not_reach_count_as_zero() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    total = GradientSum([a, b], 3)
    for uses in ([a], [b], [b]):
        sum(p.sum() for p in uses).backward()  # type: ignore[union-attr]
        total.collect()
    total.finish()
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.tolist() == [1, 1]
    assert b.grad.tolist() == [2, 2]


def test_a_missing_micro_batch_is_noticed() -> None:
    total = GradientSum([nn.Parameter(torch.ones(1))], 2)
    total.collect()
    with pytest.raises(ValueError, match="1 of 2 micro-batches"):
        total.finish()


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_at_most_one_partial_sum_a_level_is_held(count: int) -> None:
    p = nn.Parameter(torch.ones(4))
    total = GradientSum([p], count)
    held = 0
    for _ in range(count):
        p.sum().backward()
        total.collect()
        held = max(held, len(total._tree._nodes))
    assert held <= max(1, count.bit_length() - 1)


@given(count=st.integers(1, 40), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_split_into_runs_gives_the_same_bits(count: int, seed: int, data: st.DataObject) -> None:
    """Each worker adds what it can of its run; whoever gets all of their blocks, in order, ends with the same sum."""
    leaves = random_leaves(count, seed)
    edges = sorted(data.draw(st.lists(st.integers(0, count), max_size=5)))
    whole, together = digest(tree_sum(leaves)), TreeSum()
    for first, stop in itertools.pairwise([0, *edges, count]):
        part = TreeSum(first)
        for leaf in leaves[first:stop]:
            part.push([leaf.clone()])
        nodes = part.nodes()
        assert [(n.start, n.height) for n in nodes] == blocks_of(first, stop)
        assert len(nodes) <= max(1, 2 * (stop - first).bit_length() - 1)
        for node in nodes:
            together.push(node.sum, node.height)
    (total,) = together.total()
    assert total is not None
    assert digest(total) == whole


def test_a_run_from_the_middle_has_no_total() -> None:
    tree = TreeSum(3)
    tree.push([torch.ones(1)])
    with pytest.raises(ValueError, match="begins at leaf 3"):
        tree.total()


@given(count=st.integers(1, 9), first=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_gradients_of_a_run_of_micro_batches_are_added_within_blocks_of_the_tree(count: int, first: int) -> None:
    model = nn.Linear(8, 1)
    inputs = [torch.randn(4, 8, generator=torch.Generator().manual_seed(n)) * 100 for n in range(count)]
    leaves = []
    for x in inputs:
        model.zero_grad()
        model(x).sum().backward()
        assert model.weight.grad is not None
        leaves.append(model.weight.grad.clone())
    model.zero_grad()
    sums = GradientSum(list(model.parameters()), count, first)
    for x in inputs:
        model(x).sum().backward()
        sums.collect()
    blocks = sums.blocks()
    assert [(b.start, b.height) for b in blocks] == blocks_of(first, first + count)
    for block in blocks:
        mine = leaves[block.start - first : block.start - first + 2**block.height]
        assert block.sum[0] is not None
        assert digest(block.sum[0]) == digest(tree_sum(mine))
