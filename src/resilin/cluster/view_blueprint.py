"""What the members of a view know of the whole model: of each stage's parameters, who of the stage owns what. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from resilin.cluster.restore import Owners
from resilin.cluster.view import Stage, View
from resilin.layout import Layout, Mesh, ParamSpec, Place, merge
from resilin.layout import rank as rank_place
from resilin.parallel.blueprint import DENSE, EXPERTS, Blueprint
from resilin.parallel.degrees import Degrees
from resilin.parallel.expert.table import ExpertTable
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
        experts: parameters that are stacked experts, which the members of a stage may have between them.
    """

    whole: Blueprint
    view: View
    holders: Mapping[str, tuple[int, ...]]
    experts: frozenset[str] = frozenset()

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
                degrees=Degrees(data=len(stage.teams), tensor=stage.tensor, expert=stage.sharing),
                specs=self._specs(stage),
                virtual={DENSE: stage.owners},
                keep_whole=self.whole.keep_whole & {*self.names(number)},
            )
            for number, stage in enumerate(self.view.stages)
        )

    def _specs(self, stage: Stage) -> Mapping[str, ParamSpec]:
        if stage.sharing == 1 or not self.experts:
            return self.whole.specs
        cut, known = ExpertTable(stage.experts, stage.sharing).cut(), self.whole.specs
        cuts = {name: (cut, *known[name].cuts) for name in self.experts}
        return {**known, **{name: replace(known[name], cuts=cuts[name]) for name in cuts}}

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
        """By stage who owns what of the parameters that all its members have.

        Args:
            part: of every matrix that a team divides; only those who have it have those elements.
        """
        found = []
        for number, (stage, blueprint) in enumerate(zip(self.view.stages, self.stages, strict=True)):
            names = tuple(name for name in self.names(number) if blueprint.reduction_of(name) == DENSE)
            whole = tuple(blueprint.whole_owners.get(name) for name in names)
            ownership = Ownership(self._sizes(names, part), blueprint.table(DENSE), whole, len(stage.teams))
            found.append(Owners(names, ownership, stage.part(part)))
        return found

    def owners_of_experts(self, part: int = 0) -> list[Owners]:
        """Who owns what of parameters that the members of a stage have between them: by stage and place.

        Args:
            part: as above.
        """
        found = []
        for number, (stage, blueprint) in enumerate(zip(self.view.stages, self.stages, strict=True)):
            names = tuple(name for name in self.names(number) if blueprint.reduction_of(name) == EXPERTS)
            sizes, count = self._sizes(names, part), len(stage.experts)
            whole = tuple(blueprint.whole_owners.get(name) for name in names)
            for place in range(stage.sharing) if names else ():
                if not (mine := stage.experts_of(place)):
                    continue
                here = tuple(size // count * len(mine) for size in sizes)
                ownership = Ownership(here, blueprint.table(EXPERTS), whole, len(stage.teams) // stage.sharing)
                found.append(Owners(names, ownership, stage.with_experts(part, place), mine, count))
        return found

    def all_owners(self, part: int = 0) -> list[Owners]:
        """Who owns what of all parameters.

        Args:
            part: as above.
        """
        return self.owners(part) + self.owners_of_experts(part)

    def owners_with(self, member: int) -> list[Owners]:
        """Who owns what of the parameters that a member has."""
        part = self.view.team_of(member).index(member)
        return [each for each in self.all_owners(part) if member in each.members]

    def shared(self, stage: int) -> frozenset[str]:
        """The parameters that the members of a stage have between them."""
        return self.experts if self.view.stages[stage].sharing > 1 else frozenset()

    def _sizes(self, names: Sequence[str], part: int) -> tuple[int, ...]:
        """Elements of a part of some parameters, with all experts."""
        mesh = Mesh((("tp", self.view.tensor),))
        return tuple(math.prod(self.specs[name].local_shapes(mesh)[part] or ()) for name in names)
