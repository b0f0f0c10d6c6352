"""A worker's place and groups in a view, for everything that knows a `World`."""

from __future__ import annotations

from functools import cached_property

from resilin.checkpoint.process_group import ProcessGroup
from resilin.cluster.links import Links
from resilin.cluster.view import View
from resilin.parallel.degrees import Degrees
from resilin.parallel.group import Group
from resilin.parallel.world import World


class ViewWorld(World):
    """The members of a view with one stage, as one of them sees them: its groups are of the view's epoch.

    Args:
        view: who there is.
        member: this one's number.
        links: of the view's epoch.
    """

    def __init__(self, view: View, member: int, links: Links) -> None:
        super().__init__(Degrees(data=len(view.members)), view.members.index(member))
        self.view, self.member, self.links = view, member, links

    @property
    def where(self) -> str:
        """This worker's place in words."""
        return f"member {self.member}, {super().where}" if self.size > 1 else f"member {self.member}"

    @cached_property
    def everyone(self) -> Group:
        """All members."""
        return self.links.group("everyone", range(self.size))

    def saving(self) -> ProcessGroup | None:
        """Of saves, which go on beside the training; None where one worker saves. All members call together."""
        group = self.links.group("checkpoint", range(self.size)).process_group
        return None if group is None else ProcessGroup(group)

    def _connected(self) -> None:
        return None

    def _make(self, axes: tuple[str, ...]) -> Group:
        for ranks in self.members(*axes):
            if self.rank in ranks:
                return self.everyone if len(ranks) == self.size else self.links.group("+".join(axes), ranks)
        raise AssertionError(f"rank {self.rank} is in no group of {axes}")
