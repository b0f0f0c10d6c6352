"""An optimizer of what one of many workers owns: after its update every worker has all weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from resilin.nouns import Optimizer
from resilin.parallel.reduction import Reduced
from resilin.transforms import OptimizerTransform


class OwnedOptimizer(OptimizerTransform):
    """Updates the shards of some reductions.

    Args:
        inner: the optimizer of the shards, by the names of their parameters.
        reductions: whose shards they are.
    """

    def __init__(self, inner: Optimizer, reductions: Sequence[Reduced]) -> None:
        super().__init__(inner)
        self.reductions = tuple(reductions)

    def step(self, step: int) -> Mapping[str, float]:
        """Update the shards, and give the weights to all workers."""
        logs = self.inner.step(step)
        for reduction in self.reductions:
            reduction.gather()
        return logs

    def zero_grad(self) -> None:
        """Drop the gradients of shards and of parameters."""
        self.inner.zero_grad()
        for reduction in self.reductions:
            for parameter in reduction.parameters:
                parameter.grad = None
