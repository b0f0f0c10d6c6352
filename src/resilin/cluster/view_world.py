"""A worker's place and groups in a view, for everything that knows a `World`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from resilin.checkpoint.coordinator import Coordinator
from resilin.checkpoint.late_coordinator import LateCoordinator
from resilin.checkpoint.process_group import ProcessGroup
from resilin.cluster.links import Links
from resilin.cluster.view import View
from resilin.parallel.degrees import Degrees
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.world import World

_ALONE = {"rep", "cp"}  # axes of one worker each
_DATA = {"dp", "edp", "ep"}


class ViewWorld(World):
    """The members of a view, as one of them sees them: its groups are of the view's epoch.

    Stages may have unlike numbers of members, so there is no mesh of all. This member's data axis is its own stage, or
    those there who have the same part of every matrix; its tensor axis is its team. Those of the data axis who share a
    set of experts are neighbours there: its axis of experts.

    Args:
        view: who there is.
        member: this one's number.
        links: of the view's epoch.
    """

    def __init__(self, view: View, member: int, links: Links) -> None:
        self.view, self.member, self.links = view, member, links
        self.stage = view.stage_of(member)
        self._mine = view.stages[self.stage].members
        self._team = view.team_of(member)
        self._part = self._team.index(member)
        self._alike = view.stages[self.stage].part(self._part)
        self._sharing = view.stages[self.stage].sharing
        self._made: dict[tuple[int, ...], Group] = {}
        super().__init__(Degrees(data=len(view.members)), view.members.index(member))

    def __str__(self) -> str:
        if len(self.view.stages) == self.view.tensor == 1:
            return super().__str__()
        return f"{self.size} workers ({self.view})"

    @property
    def where(self) -> str:
        """This worker's place in words."""
        said = [f"member {self.member}"]
        if len(self.view.stages) > 1:
            said.append(f"pipeline stage {self.stage}")
        if len(self._alike) > 1:
            said.append(f"data {self.coordinate('dp')}")
        if len(self._team) > 1:
            said.append(f"tensor {self._part}")
        if self._sharing > 1:
            said.append(f"experts {self.coordinate('ep')}")
        return ", ".join(said)

    @cached_property
    def _ranks(self) -> dict[int, int]:
        return {number: rank for rank, number in enumerate(self.view.members)}

    def _ranks_of(self, members: Iterable[int]) -> tuple[int, ...]:
        return tuple(self._ranks[number] for number in members)

    def coordinate(self, axis: str) -> int:
        """Where this worker stands: the place in its stage or in its team, or the stage."""
        if axis in _DATA:
            place = self._alike.index(self.member)
            return {"ep": place % self._sharing, "edp": place // self._sharing}.get(axis, place)
        return {"pp": self.stage, "tp": self._part}.get(self._known(axis), 0)

    def axis(self, axis: str) -> int:
        """How many teams this worker's stage has, how many members a team has, or how many stages there are."""
        if axis in _DATA:
            count = len(self._alike)
            return {"ep": self._sharing, "edp": count // self._sharing}.get(axis, count)
        return {"pp": len(self.view.stages), "tp": len(self._team)}.get(self._known(axis), 1)

    @staticmethod
    def _known(axis: str) -> str:
        if axis not in {*_ALONE, *_DATA, "pp", "tp"}:
            raise ParallelError(f"there is no axis {axis!r}")
        return axis

    @cached_property
    def everyone(self) -> Group:
        """All members."""
        return self.links.group("everyone", range(self.size))

    @cached_property
    def line(self) -> Group:
        """All members with the same part of every matrix, for what goes from stage to stage."""
        ranks = self._ranks_of(number for stage in self.view.stages for number in stage.part(self._part))
        return self.links.group(f"stages{self._part}", ranks)

    @cached_property
    def ends(self) -> Group:
        """All members of the first and the last stage with the same part of every matrix, in this order."""
        stages = self.view.stages
        ranks = self._ranks_of(number for stage in (stages[0], stages[-1]) for number in stage.part(self._part))
        return self.links.group(f"ends{self._part}", ranks)

    def saving(self) -> Coordinator | None:
        """Of saves, which go on beside the training; None where one worker saves."""
        return None if self.size == 1 else LateCoordinator(self.rank, self.size, self._saving)

    def _saving(self) -> ProcessGroup:
        group = self.links.group("checkpoint", range(self.size), near=False)
        assert group.process_group is not None
        return ProcessGroup(group.process_group, group.wait)

    def members(self, *axes: str) -> list[tuple[int, ...]]:
        """The ranks of this worker's stage, of its team, or this one by itself."""
        return [self._ranks_of(self._along(axes))]

    def _along(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        places, tensor = self._places(set(axes)), self.view.tensor
        parts = range(tensor) if "tp" in axes else (self._part,)
        return tuple(self._mine[place * tensor + part] for place in places for part in parts)

    def _places(self, axes: set[str]) -> range:
        """Of this worker's data axis, places that differ on these axes only."""
        mine, count, sharing = self.coordinate("dp"), len(self._alike), self._sharing
        if "dp" in axes or {"ep", "edp"} <= axes:
            return range(count)
        if "ep" in axes:
            return range(mine - mine % sharing, mine - mine % sharing + sharing)
        return range(mine % sharing, count, sharing) if "edp" in axes else range(mine, mine + 1)

    def _connected(self) -> None:
        return None

    def _make(self, axes: tuple[str, ...]) -> Group:
        if "pp" in map(self._known, axes):
            raise ParallelError("stages with unlike numbers of members have no groups along the pipeline")
        (ranks,) = self.members(*axes)
        if len(ranks) == self.size:
            return self.everyone
        if ranks not in self._made:  # several axes may be one and the same
            self._made[ranks] = self.links.group(f"of{'-'.join(map(str, ranks))}", ranks)
        return self._made[ranks]
