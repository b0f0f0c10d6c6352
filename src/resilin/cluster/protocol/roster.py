"""Who there is, and what each has said last. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from resilin.cluster.protocol.messages import Beat, Committed, Computed, Done, Failed, Halted, Ready
from resilin.cluster.protocol.newest import Copies
from resilin.cluster.view import View


@dataclass
class Member:
    """One that is not lost.

    Attributes:
        host: its machine.
        heard: when it said something, in seconds.
        warm: whether it is ready for a place.
        leaving: whether it wants to go.
        epoch: of the last view that it was told to be in; -1: it has no place.
        beat: its last sign of life, like what follows.
        halted: since it was told a place.
        ready: likewise.
        done: likewise.
        failed: its own program.
        committed: the last version that it has copied.
        computed: the last step whose micro-batches it has all computed while others wait for that.
    """

    host: str
    heard: float
    warm: bool = False
    leaving: bool = False
    epoch: int = -1
    beat: Beat | None = None
    halted: Halted | None = None
    ready: Ready | None = None
    done: Done | None = None
    failed: Failed | None = None
    committed: Committed | None = None
    computed: Computed | None = None


class Roster(dict[int, Member]):
    """By number all members that are not lost."""

    def placed(self) -> list[int]:
        """Those in the present view, or who were told to be in the next."""
        return [number for number, member in self.items() if member.epoch >= 0]

    def staying(self) -> list[int]:
        """Those of them that do not want to go."""
        return [number for number in self.placed() if not self[number].leaving]

    def hosts(self) -> dict[int, str]:
        """By number the machines of all who may be in the next view."""
        return {number: one.host for number, one in sorted(self.items()) if one.warm and not one.leaving}

    def newcomers(self) -> list[int]:
        """Those that are ready for a first place, or for another one."""
        return [number for number, member in self.items() if member.warm and member.epoch < 0]

    def there(self, numbers: Iterable[int]) -> list[int]:
        """Who of these is not lost."""
        return [number for number in numbers if number in self]

    def halted(self) -> dict[int, Halted]:
        """What everyone who has come out has said."""
        return {number: halted for number in self.placed() if (halted := self[number].halted) is not None}

    def copies(self) -> dict[int, Copies]:
        """What they have in their memory."""
        return {number: halted.copies for number, halted in self.halted().items()}

    def all_computed(self, view: View, step: int) -> bool:
        """Whether all of a view have computed a step: who came out earlier would end the passes of others."""
        return all(self[number].computed == Computed(view.epoch, step) for number in self.there(view.members))

    def all_done(self, view: View) -> bool:
        """Whether all who are left of a view have taken all steps."""
        left = self.there(view.members)
        return bool(left) and all(self[number].done is not None for number in left)

    def digests(self, view: View) -> list[set[str]]:
        """What members of a view that have the same weights have told of them when they were done."""
        return [
            {getattr(done, what) for number in self.there(alike) if (done := self[number].done) is not None}
            for what, groups in (("digest", view.alike), ("experts", view.alike_experts))
            for alike in groups
        ]
