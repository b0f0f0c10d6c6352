"""Sums of micro-batches that come in any order, and what of a step need not be computed again."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from resilin.nouns import Loss
from resilin.parallel.canonical import GradientSum, TreeSum
from resilin.parallel.stretches import Kept, LeafSums, StretchSums, blocks_in, in_all, in_one, leaves_in, left_to_do


def gradients(count: int) -> list[torch.Tensor]:
    """Of magnitudes so unlike that another order of additions gives other bits."""
    draw = torch.Generator().manual_seed(count)
    return [torch.randn(5, generator=draw) * 10.0 ** (number % 7 - 3) for number in range(count)]


def summed(micros: list[int], leaves: list[torch.Tensor]) -> LeafSums:
    weight = nn.Parameter(torch.zeros(5))
    sums = LeafSums([weight])
    for micro in micros:
        weight.grad = leaves[micro].clone()
        sums.collect(micro)
        assert weight.grad is None
    return sums


@given(st.data())
def test_any_order_gives_the_blocks_of_the_tree_to_the_bit(data: st.DataObject):
    count = data.draw(st.integers(1, 20))
    leaves, order = gradients(count), data.draw(st.permutations(range(count)))
    mine = order[: data.draw(st.integers(1, count))]
    blocks = summed(mine, leaves).blocks()
    assert [block[:2] for block in blocks] == blocks_in(sorted(mine))
    weight = nn.Parameter(torch.zeros(5))
    in_order = StretchSums(lambda leaves, first: GradientSum([weight], leaves, first), sorted(mine))
    for micro in sorted(mine):
        weight.grad = leaves[micro].clone() if weight.grad is None else weight.grad.add_(leaves[micro])
        in_order.collect(micro)
    for block, expected in zip(blocks, in_order.blocks(), strict=True):
        assert torch.equal(block.sum[0], expected.sum[0])  # type: ignore[arg-type]


def test_the_order_matters_to_these_gradients():
    leaves = gradients(8)
    tree = TreeSum()
    for leaf in leaves:
        tree.push([leaf.clone()])
    assert not torch.equal(tree.total()[0], sum(leaves))  # type: ignore[arg-type]


def test_gradients_of_a_micro_batch_that_is_not_the_next_are_refused():
    weight = nn.Parameter(torch.zeros(5))
    sums = StretchSums(lambda leaves, first: GradientSum([weight], leaves, first), [2, 3])
    weight.grad = torch.ones(5)
    with pytest.raises(ValueError, match="of micro-batch 3 were collected where those of 2 come next"):
        sums.collect(3)
    with pytest.raises(ValueError, match="more micro-batches"):
        StretchSums(lambda leaves, first: GradientSum([weight], leaves, first), []).collect(0)


def kept(micros: list[int], count: int) -> Kept:
    losses = {micro: Loss(torch.tensor(float(micro)), torch.tensor(1.0), {}) for micro in micros}
    return Kept(3, tuple(sorted(micros)), losses, [summed(micros, gradients(count)).blocks()], [["weight"]])


def test_what_is_kept_is_found_by_the_names_of_parameters_whatever_a_worker_has_from_now_on():
    found = kept([0, 1, 2, 3, 6], 8)
    other = found.for_names([["more", "weight"]])
    assert other.sums("more") == [None, None]
    assert all(a is b for a, b in zip(other.sums("weight"), found.sums("weight"), strict=True))
    assert found.for_names([["weight"]]) is found
    assert found.sums("more") == [None, None], "others sum its gradient"
    assert (found.without(["weight"]).chunks[0][0].sum, found.given([["other"]]).chunks) == ([], [[]])


def test_of_what_is_kept_whole_blocks_can_be_left_out():
    found = kept([0, 1, 2, 3, 6], 8).only([6])
    assert (found.micros, list(found.losses)) == ((6,), [6])
    assert [block[:2] for block in found.chunks[0]] == [(6, 0)]
    with pytest.raises(ValueError, match="are no blocks of their own"):
        kept([0, 1, 2, 3, 6], 8).only([0, 1])


def test_a_sum_of_all_that_a_worker_has_is_kept_in_whole_and_added_to():
    whole = replace(kept([0, 1, 2], 8), whole=True, chunks=[in_one(summed([0, 1, 2], gradients(8)).blocks())])
    assert whole.only([2, 0, 1]) is whole
    with pytest.raises(ValueError, match="are no blocks of their own"):
        whole.only([0, 1])
    more = replace(kept([5], 8), whole=True).after(whole)
    assert (more.micros, list(more.losses)) == ((0, 1, 2, 5), [0, 1, 2, 5])
    ((total,),) = [node.sum for node in more.chunks[0]]
    torch.testing.assert_close(total, sum(gradients(8)[micro] for micro in (0, 1, 2, 5)))


@given(st.lists(st.lists(st.sets(st.integers(0, 11)), min_size=1, max_size=3), min_size=1, max_size=3))
def test_stages_keep_the_same_micro_batches_and_whole_blocks(drawn: list[list[set[int]]]):
    stages = []
    for stage in drawn:  # nobody has what another one of the stage has
        seen: set[int] = set()
        stages.append([])
        for mine in stage:
            stages[-1].append(sorted(mine - seen))
            seen |= mine
    found = in_all(stages)
    together = [sorted(chain.from_iterable(stage)) for stage in found]
    assert all(each == together[0] for each in together)
    for before, after in zip(chain.from_iterable(stages), chain.from_iterable(found), strict=True):
        whole = [set(leaves_in(block)) for block in blocks_in(before)]
        assert set(after) == set().union(*(block for block in whole if block <= set(after)))
    again = [left_to_do(12, stage) for stage in found]
    assert all(sorted(chain.from_iterable(dealt)) == list(range(12)) for dealt in again)


def test_what_all_stages_have_is_kept():
    assert in_all([[[0, 1], [2, 3]], [[0, 1, 2, 3]]]) == [[[0, 1], [2, 3]], [[0, 1, 2, 3]]]
    assert in_all([[[0, 1], [2]], [[0, 1, 2, 3]]]) == [[[], []], [[]]]  # the block of four is not to be taken apart
    assert in_all([[[0, 1, 4]], [[4, 5], [0, 1]]]) == [[[0, 1]], [[], [0, 1]]]


@given(st.sets(st.integers(0, 15)), st.sets(st.integers(0, 15)))
def test_what_was_kept_and_what_was_computed_since_make_the_blocks_of_both(before: set[int], more: set[int]):
    more -= before
    found = kept(sorted(before), 16).after(kept(sorted(more), 16))
    assert found.micros == tuple(sorted(before | more))
    together = summed(sorted(before | more), gradients(16)).blocks()
    assert [block[:2] for block in found.chunks[0]] == [block[:2] for block in together] == blocks_in(found.micros)
    for block, expected in zip(found.chunks[0], together, strict=True):
        assert torch.equal(block.sum[0], expected.sum[0])  # type: ignore[arg-type]


def test_an_orphan_goes_to_whom_its_neighbour_in_the_tree_is_with_of_those_that_have_least():
    assert left_to_do(6, [[0, 1], [2, 4]]) == [[0, 1, 5], [2, 3, 4]]
    assert left_to_do(8, [[0, 1, 2], [6], [4]]) == [[0, 1, 2], [3, 6, 7], [4, 5]]
    assert left_to_do(5, [[], []]) == [[0, 2, 4], [1, 3]], "of equals the first"
