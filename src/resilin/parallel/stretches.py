"""The leaves of a worker that has any of a step's micro-batches: stretches of neighbours, and what is kept of them.

A worker of a cluster that never changes has one stretch. After a loss it has its own micro-batches and some of the
lost worker's, and what it had finished before need not be computed again: a block of the canonical tree is the same sum
whoever asks for it, and whenever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resilin.nouns import Loss
from resilin.parallel.canonical import GradientSum, Node, TreeSum, blocks_of


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


def left_to_do(micros: int, kept: Sequence[Sequence[int]]) -> list[list[int]]:
    """Who computes what of a step that is redone: everyone keeps what he has, the rest goes to who has least.

    Orphans are taken in ascending order; of equals the first worker takes one (ElasWave, section 1).

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
        min(found, key=len).append(number)
    return [sorted(mine) for mine in found]


class StretchSums:
    """Sums the gradients of some of a step's micro-batches, block by block.

    Args:
        make: a sum of so many leaves, of which the first has this number.
        micros: ascending numbers.
    """

    def __init__(self, make: Callable[[int, int], GradientSum], micros: Sequence[int]) -> None:
        self._make, self._runs = make, stretches(micros)
        self._sum: GradientSum | None = None
        self._left = 0
        self._done: list[Node] = []

    def collect(self) -> None:
        """Take the gradients just computed for the next micro-batch.

        Raises:
            ValueError: there is no next one.
        """
        if self._sum is None:
            if not self._runs:
                raise ValueError("gradients of more micro-batches were collected than this worker has")
            run = self._runs.pop(0)
            self._sum, self._left = self._make(len(run), run.start), len(run)
        self._sum.collect()
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


@dataclass
class Kept:
    """What a worker has finished of a step.

    Attributes:
        step: which.
        losses: by micro-batch; {} at a worker that computes none.
        micros: numbers of the micro-batches, ascending.
        chunks: for each part of the model that the worker has, the blocks of its gradient.
    """

    step: int
    micros: tuple[int, ...]
    losses: dict[int, Loss]
    chunks: list[list[Node]]

    def after(self, before: Kept) -> Kept:
        """Together with what was kept of the same step before; its memory is used."""
        both = zip(before.chunks, self.chunks, strict=True)
        return Kept(
            self.step,
            tuple(sorted((*before.micros, *self.micros))),
            before.losses | self.losses,
            [joined([*old, *new]) for old, new in both],
        )
