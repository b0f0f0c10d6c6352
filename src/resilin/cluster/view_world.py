"""A worker's place and groups in a view, for everything that knows a `World`."""

from __future__ import annotations

from functools import cached_property

from resilin.checkpoint.process_group import ProcessGroup
from resilin.cluster.links import Links
from resilin.cluster.view import View
from resilin.parallel.degrees import Degrees
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.world import World

_ALONE = {"rep", "cp", "tp", "ep"}  # axes of one worker each
_DATA = {"dp", "edp"}


class ViewWorld(World):
    """The members of a view, as one of them sees them: its groups are of the view's epoch.

    Stages may have unlike numbers of members, so there is no mesh of all. This member's data axis is its own stage.

    Args:
        view: who there is.
        member: this one's number.
        links: of the view's epoch.
    """

    def __init__(self, view: View, member: int, links: Links) -> None:
        self.view, self.member, self.links = view, member, links
        self.stage = view.stage_of(member)
        self._mine = view.stages[self.stage].members
        super().__init__(Degrees(data=len(view.members)), view.members.index(member))

    def __str__(self) -> str:
        if len(self.view.stages) == 1:
            return super().__str__()
        return f"{self.size} workers ({self.view})"

    @property
    def where(self) -> str:
        """This worker's place in words."""
        said = [f"member {self.member}"]
        if len(self.view.stages) > 1:
            said.append(f"pipeline stage {self.stage}")
        if len(self._mine) > 1:
            said.append(f"data {self.coordinate('dp')}")
        return ", ".join(said)

    @cached_property
    def stage_ranks(self) -> tuple[int, ...]:
        """The ranks of this member's stage."""
        first = sum(len(stage.members) for stage in self.view.stages[: self.stage])
        return tuple(range(first, first + len(self._mine)))

    def coordinate(self, axis: str) -> int:
        """Where this worker stands: the place in its stage, or the stage."""
        if axis in _DATA:
            return self._mine.index(self.member)
        return self.stage if self._known(axis) == "pp" else 0

    def axis(self, axis: str) -> int:
        """How many members this worker's stage has, or how many stages there are."""
        if axis in _DATA:
            return len(self._mine)
        return len(self.view.stages) if self._known(axis) == "pp" else 1

    @staticmethod
    def _known(axis: str) -> str:
        if axis not in {*_ALONE, *_DATA, "pp"}:
            raise ParallelError(f"there is no axis {axis!r}")
        return axis

    @cached_property
    def everyone(self) -> Group:
        """All members."""
        return self.links.group("everyone", range(self.size))

    @cached_property
    def line(self) -> Group:
        """All members, for what goes from stage to stage."""
        return self.links.group("stages", range(self.size))

    def saving(self) -> ProcessGroup | None:
        """Of saves, which go on beside the training; None where one worker saves. All members call together."""
        group = self.links.group("checkpoint", range(self.size))
        return None if group.process_group is None else ProcessGroup(group.process_group, group.wait)

    def members(self, *axes: str) -> list[tuple[int, ...]]:
        """The ranks of this worker's stage, or this one by itself."""
        return [self.stage_ranks if _DATA & set(axes) else (self.rank,)]

    def _connected(self) -> None:
        return None

    def _make(self, axes: tuple[str, ...]) -> Group:
        if "pp" in map(self._known, axes):
            raise ParallelError("stages with unlike numbers of members have no groups along the pipeline")
        return self._together if _DATA & set(axes) else Group.alone(self.rank)

    @cached_property
    def _together(self) -> Group:
        """The members of this stage."""
        whole = len(self.stage_ranks) == self.size
        return self.everyone if whole else self.links.group(f"stage{self.stage}", self.stage_ranks)
