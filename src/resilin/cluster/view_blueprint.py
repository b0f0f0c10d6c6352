"""What the members of a view know of the whole model: of each stage's parameters, who of the stage owns what. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

from resilin.cluster.restore import Owners
from resilin.cluster.view import View
from resilin.layout import Layout, Mesh, ParamSpec, Place, merge
from resilin.layout import rank as rank_place
from resilin.parallel.blueprint import DENSE, Blueprint
from resilin.parallel.degrees import Degrees
from resilin.parallel.ownership import Ownership
from resilin.parallel.state import Entry


def _place(first: int, rank: int) -> Place:
    return rank_place(first + rank)


@dataclass(frozen=True)
class ViewBlueprint:
    """A model on the members of a view.

    Attributes:
        whole: of the uncut model.
        view: who there is.
        holders: by parameter the stages that have it, ascending; what is not there is at every stage.
    """

    whole: Blueprint
    view: View
    holders: Mapping[str, tuple[int, ...]]

    def names(self, stage: int) -> tuple[str, ...]:
        """The trained parameters of a stage, in the model's order."""
        return tuple(name for name in self.whole.trained if self._has(stage, name))

    def firsts(self, stage: int) -> tuple[str, ...]:
        """Those of them that no earlier stage has."""
        return tuple(name for name in self.names(stage) if stage == self.holders.get(name, (0,))[0])

    def _has(self, stage: int, name: str) -> bool:
        return name not in self.holders or stage in self.holders[name]

    @cached_property
    def stages(self) -> tuple[Blueprint, ...]:
        """By stage the blueprint of its parameters on its members; of all others it knows the numbers only."""
        return tuple(
            replace(
                self.whole,
                degrees=Degrees(data=len(stage.teams), tensor=stage.tensor),
                virtual={DENSE: stage.owners},
                keep_whole=self.whole.keep_whole & {*self.names(number)},
            )
            for number, stage in enumerate(self.view.stages)
        )

    @property
    def specs(self) -> Mapping[str, ParamSpec]:
        """Of the whole parameters."""
        return self.whole.specs

    def layout(self, tensors: Mapping[str, Entry]) -> Layout:
        """Who has what of a state; see `Blueprint.layout`."""
        parts, first = [], 0
        for number, (stage, blueprint) in enumerate(zip(self.view.stages, self.stages, strict=True)):
            mine = {name: entry for name, entry in tensors.items() if not entry[1] or self._has(number, entry[1])}
            parts.append(blueprint.layout(mine, partial(_place, first)))
            first += len(stage.members)
        return parts[0] if len(parts) == 1 else merge(*parts)

    def owners(self, part: int = 0) -> list[Owners]:
        """By stage who owns what of its parameters.

        Args:
            part: of every matrix that a team divides; only those who have it have those elements.
        """
        found, mesh = [], Mesh((("tp", self.view.tensor),))
        for number, (stage, blueprint) in enumerate(zip(self.view.stages, self.stages, strict=True)):
            names = self.names(number)
            sizes = tuple(math.prod(self.specs[name].local_shapes(mesh)[part] or ()) for name in names)
            whole = tuple(blueprint.whole_owners.get(name) for name in names)
            ownership = Ownership(sizes, blueprint.table(DENSE), whole, len(stage.teams))
            found.append(Owners(names, ownership, stage.part(part)))
        return found
