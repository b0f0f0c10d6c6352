"""Which steps a number of loops should have: all trajectories, read on held-out data, the best first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from torch import nn

from resilin.nested.budgets import Budget, BudgetError
from resilin.nested.consistency import Consistency, consistency
from resilin.nested.in_place import decoder_in
from resilin.nested.trajectories import Trajectory, compositions
from resilin.nouns import Batch


@dataclass(frozen=True, slots=True)
class Searched:
    """A trajectory and how good it is.

    Attributes:
        steps: in units of 1/L.
        quality: on the batches.
    """

    steps: Trajectory
    quality: Consistency

    @property
    def wanted(self) -> Budget:
        """Its budget."""
        return Budget(loops=self.steps)


def search(model: nn.Module, loops: int, batches: Iterable[Batch], *, most: int = 200) -> Sequence[Searched]:
    """Every trajectory of `loops` steps in units of 1/L, by rising loss; all are read on the same prefixes.

    Args:
        model: a looped decoder whose blocks are told of steps.
        loops: how many, at most L.
        batches: of held-out tokens and labels.
        most: trajectories that are read: there are (L - 1)! / (loops - 1)! / (L - loops)!.

    Raises:
        BudgetError: the model does not know of steps, has fewer loops, or there are more trajectories than `most`.
    """
    settings = decoder_in(model).settings
    if settings.loop is None or settings.loop.condition != "time_and_step":
        raise BudgetError("only looped decoders that are told of steps (condition 'time_and_step') have trajectories")
    whole = settings.loop.times
    if not 1 <= loops <= whole:
        raise BudgetError(f"trajectories of {loops} loops: expected 1 to {whole}, the loops of the model")
    found = list(islice(compositions(loops, whole), most + 1))
    if len(found) > most:
        raise BudgetError(f"{loops} of {whole} loops have more than {most} trajectories: raise most, or choose some")
    read = consistency(model, [Budget(loops=steps) for steps in found], batches)
    pairs = [Searched(steps, quality) for steps, quality in zip(found, read, strict=True)]
    return sorted(pairs, key=lambda one: one.quality.loss)
