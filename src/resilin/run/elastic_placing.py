"""What builds a worker's part of a view, and what it gives: a protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from resilin.cluster.view import View
from resilin.cluster.view_world import ViewWorld
from resilin.parallel.assemble import Assembled
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.pipeline.pace import Pace
from resilin.run.elastic_dealing import Dealing


@dataclass(frozen=True)
class Placed:
    """What a worker is in a view.

    Attributes:
        model: what of it this worker has.
        made: engine and optimizer.
        fresh: names of parameters that have no values yet.
        pace: of its stage.
    """

    model: nn.Module
    made: Assembled
    fresh: frozenset[str] = frozenset()
    pace: Pace = field(default_factory=Pace)


class Placing(Protocol):
    """Builds a worker's part of a view.

    Attributes:
        whole: of the uncut model.
        costs: of every block and the head, by which blocks are divided over stages; empty: they are not.
        experts: names of the parameters that are stacked experts, where members may have them between them.
    """

    whole: Blueprint
    experts: frozenset[str]
    costs: tuple[float, ...]

    def holders(self, view: View) -> Mapping[str, tuple[int, ...]]:
        """See `ViewBlueprint.holders`."""

    def build(self, world: ViewWorld, blueprint: Blueprint, dealing: Dealing, *, begins: bool) -> Placed:
        """The part of a worker.

        Args:
            world: of the view.
            blueprint: of this worker's stage.
            dealing: of micro-batches.
            begins: whether all weights are what the run begins with.
        """
