"""The leaves of a worker that has any of a step's micro-batches: stretches of neighbours, and what is kept of them.

A worker of a cluster that never changes has one stretch. After a loss it has its own micro-batches and some of the
lost worker's, and what it had finished before need not be computed again: a block of the canonical tree is the same sum
whoever asks for it, and whenever.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from resilin.nouns import Loss
from resilin.parallel.canonical import GradientSum, Leaf, Node, TreeSum, added, blocks_of


def stretches(micros: Sequence[int]) -> list[range]:
    """Runs of neighbours among ascending numbers."""
    found: list[range] = []
    for number in micros:
        if found and number == found[-1].stop:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def blocks_in(micros: Sequence[int]) -> list[tuple[int, int]]:
    """(start, height) of the blocks of the tree that these leaves make by themselves, in order."""
    return [block for run in stretches(micros) for block in blocks_of(run.start, run.stop)]


def joined(nodes: Sequence[Node]) -> list[Node]:
    """Blocks in order, those that make a larger one added up; the memory of the given ones is used."""
    found: list[Node] = []
    tree: TreeSum | None = None
    end = -1
    for node in sorted(nodes, key=lambda one: one.start):
        if tree is None or node.start != end:
            found += tree.nodes() if tree is not None else []
            tree = TreeSum(node.start)
        tree.push(node.sum, node.height)
        end = node.start + 2**node.height
    return found + (tree.nodes() if tree is not None else [])


def in_one(nodes: Sequence[Node]) -> list[Node]:
    """The sum of all, one after the other, in the memory of the first; none of none."""
    if not nodes:
        return []
    tree = TreeSum()
    for node in nodes:
        tree.push(node.sum)
    return [Node(nodes[0].start, 0, tree.total())]


def leaves_in(block: Node | tuple[int, int]) -> range:
    """The numbers of a block's leaves, from its (start, height, ...)."""
    return range(block[0], block[0] + 2 ** block[1])


def in_all(kept: Sequence[Sequence[Sequence[int]]]) -> list[list[list[int]]]:
    """What need not be computed again where each micro-batch passes through several stages.

    A stage can do without a micro-batch only if all can; and what it has is sums of blocks, of which it needs all
    leaves or none.

    Args:
        kept: by stage and member the numbers of the micro-batches that are finished there.

    Returns:
        The same, less what has to be computed again.
    """
    left = [[set(mine) for mine in stage] for stage in kept]
    while True:
        common = set.intersection(*(set().union(*stage) for stage in left))
        closed = [
            [{leaf for block in blocks_in(sorted(mine)) if common.issuperset(leaves_in(block)) for leaf in
              leaves_in(block)} for mine in stage] for stage in left
        ]  # fmt: skip
        if closed == left:
            return [[sorted(mine) for mine in stage] for stage in left]
        left = closed


def left_to_do(micros: int, kept: Sequence[Sequence[int]]) -> list[list[int]]:
    """Who computes what of a step that is redone: everyone keeps what he has, the rest goes to who has least.

    Orphans are taken in ascending order; of equals that worker takes one which then has the fewest blocks of the tree
    more than before, as each block is sent by itself, and of these the first (ElasWave, section 1).

    Args:
        micros: micro-batches of the step.
        kept: by worker the numbers of those that are finished.

    Raises:
        ValueError: a micro-batch is kept twice, or there is none of that number.
    """
    found = [sorted(mine) for mine in kept]
    seen = [number for mine in found for number in mine]
    if len(set(seen)) != len(seen) or any(not 0 <= number < micros for number in seen):
        raise ValueError(f"of {micros} micro-batches these are kept: {found}")
    for number in sorted(set(range(micros)) - set(seen)):
        least = min(map(len, found))
        able = [mine for mine in found if len(mine) == least]
        taker = min(able, key=lambda mine: len(blocks_in(sorted([*mine, number]))) - len(blocks_in(mine)))
        taker.append(number)
        taker.sort()
    return found


class StretchSums:
    """Sums the gradients of some of a step's micro-batches, block by block.

    Args:
        make: a sum of so many leaves, of which the first has this number.
        micros: ascending numbers.
    """

    def __init__(self, make: Callable[[int, int], GradientSum], micros: Sequence[int]) -> None:
        self._make, self._runs = make, stretches(micros)
        self._sum: GradientSum | None = None
        self._left = self._next = 0
        self._done: list[Node] = []

    def collect(self, micro: int) -> None:
        """Take the gradients just computed for the next micro-batch, which has this number.

        Raises:
            ValueError: it is not the next one.
        """
        if self._sum is None:
            if not self._runs:
                raise ValueError("gradients of more micro-batches were collected than this worker has")
            run = self._runs.pop(0)
            self._next = run.start
            self._sum, self._left = self._make(len(run), run.start), len(run)
        if micro != self._next:
            raise ValueError(f"gradients of micro-batch {micro} were collected where those of {self._next} come next")
        self._sum.collect()
        self._next += 1
        self._left -= 1
        if not self._left:
            self._done += self._sum.blocks()
            self._sum = None

    def blocks(self) -> list[Node]:
        """All blocks, in order.

        Raises:
            ValueError: gradients of some micro-batches are still to come.
        """
        if self._sum is not None or self._runs:
            left = self._left + sum(map(len, self._runs))
            raise ValueError(f"{left} micro-batches were not collected")
        return self._done


class LeafSums:
    """Sums the gradients of a step's micro-batches in whatever order they come; `StretchSums` needs less memory.

    Two neighbouring blocks are added as soon as both are there, so the sums are those of the tree, to the bit.

    Args:
        parameters: whose gradients are summed.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._nodes: dict[tuple[int, int], Leaf] = {}

    def collect(self, micro: int) -> None:
        """Take the gradients just computed for a micro-batch of the step."""
        leaf: Leaf = [p.grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        start, height = micro, 0
        while (other := self._nodes.pop((start ^ 2**height, height), None)) is not None:
            leaf = added(other, leaf) if start & 2**height else added(leaf, other)
            start, height = start & ~(2**height), height + 1
        self._nodes[start, height] = leaf

    def blocks(self) -> list[Node]:
        """All blocks that are there, in order."""
        return [Node(start, height, leaf) for (start, height), leaf in sorted(self._nodes.items(), key=lambda n: n[0])]


@dataclass
class Kept:
    """What a worker has finished of a step.

    Attributes:
        step: which.
        losses: by micro-batch; {} at a worker that computes none.
        micros: numbers of the micro-batches, ascending.
        chunks: for each part of the model that the worker has, the blocks of its gradient.
        names: likewise those of the parameters that blocks have gradients of, in their order.
        of: how many micro-batches the step has.
        workers: of the data axis, for whom they were cut.
        whole: whether there is one sum of all these micro-batches, in no order of the tree, instead of blocks.
    """

    step: int
    micros: tuple[int, ...]
    losses: dict[int, Loss]
    chunks: list[list[Node]]
    names: Sequence[Sequence[str]]
    of: int = 0
    workers: int = 0
    whole: bool = False

    def only(self, micros: Collection[int]) -> Kept:
        """Of these micro-batches, and of no others: blocks that have any other are dropped.

        Raises:
            ValueError: some of them are in no block of their own.
        """
        wanted = set(micros)
        if self.whole and wanted == {*self.micros}:
            return self
        chunks = [[node for node in chunk if wanted.issuperset(leaves_in(node))] for chunk in self.chunks]
        if any({leaf for node in chunk for leaf in leaves_in(node)} != wanted for chunk in chunks):
            raise ValueError(f"of the micro-batches {list(self.micros)}, {sorted(wanted)} are no blocks of their own")
        losses = {micro: loss for micro, loss in self.losses.items() if micro in wanted}
        return replace(self, micros=tuple(sorted(wanted)), losses=losses, chunks=chunks)

    def for_names(self, names: Sequence[Sequence[str]]) -> Kept:
        """What is known of other parameters; what is not there is None."""
        if [*map(list, names)] == [*map(list, self.names)]:
            return self
        chunks = []
        for nodes, had, wanted in zip(self.chunks, self.names, names, strict=True):
            place = {name: at for at, name in enumerate(had)}
            chunks.append(
                [node._replace(sum=[node.sum[place[n]] if n in place else None for n in wanted]) for node in nodes]
            )
        return replace(self, chunks=chunks, names=names)

    def sums(self, name: str) -> list[Tensor | None]:
        """Of one parameter, block by block in order; None where others sum its gradient."""
        for nodes, names in zip(self.chunks, self.names, strict=True):
            if name in names:
                at = [*names].index(name)
                return [node.sum[at] for node in nodes]
        return [None for _ in self.chunks[0]]

    def given(self, names: Sequence[Sequence[str]]) -> Kept:
        """What is left for other parameters, once others have all sums: losses."""
        return replace(self, micros=(), chunks=[[] for _ in names], names=names)

    def without(self, names: Collection[str]) -> Kept:
        """As it is, but for some parameters."""
        return self.for_names([[name for name in each if name not in names] for each in self.names])

    def after(self, before: Kept) -> Kept:
        """Together with what was kept of the same step before; its memory is used."""
        both = zip(before.chunks, self.chunks, strict=True)
        together = in_one if self.whole else joined
        return replace(
            self,
            micros=tuple(sorted((*before.micros, *self.micros))),
            losses=before.losses | self.losses,
            chunks=[together([*old, *new]) for old, new in both],
        )
