"""What a change takes at one member, part by part: which of them is slow is read off, not guessed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Read:
    """What was read from copies of one member's states.

    Attributes:
        seconds: it took.
        bytes: in all.
    """

    seconds: float = 0.0
    bytes: int = 0


class Parts:
    """Seconds by part. One follows the other: a part ends where the next begins.

    Args:
        clock: gives seconds.

    Attributes:
        seconds: by part, of those that have ended.
        bytes: by part, of those that read states.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._part, self._since = clock, "", 0.0
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}

    def begin(self, part: str) -> None:
        """Another part begins; "": none."""
        now = self._clock()
        if self._part:
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    def read(self, reads: Mapping[int, Read], members: Collection[int], me: int) -> None:
        """States that lost members had are restored, those of the others migrate; that ends the present part.

        Args:
            reads: by owner.
            members: who is left.
            me: whose own copy is loaded from this process's memory.
        """
        self.begin("")
        for owner, told in reads.items():
            if owner == me:
                self.seconds["load"] = self.seconds.get("load", 0.0) + told.seconds
                continue
            part = "migrate" if owner in members else "restore"
            self.seconds[part] = self.seconds.get(part, 0.0) + told.seconds
            self.bytes[part] = self.bytes.get(part, 0) + told.bytes
