"""What a coordinator decides, for the runtime, or a simulation, to carry out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resilin.cluster.protocol.messages import Message


@dataclass(frozen=True, slots=True)
class Tell:
    """Say something to a member."""

    number: int
    message: Message


@dataclass(frozen=True, slots=True)
class Fence:
    """See to it that a member does nothing any more."""

    number: int
    why: str


@dataclass(frozen=True, slots=True)
class SetClocks:
    """Hand clocks to whoever sets them.

    Attributes:
        stages: for each `stage`, `members`, `clock` and `usual`.
    """

    stages: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Note:
    """For the log: what was decided and why.

    Attributes:
        what: a word: "change", "lost", "go", "end".
        facts: as JSON values.
    """

    what: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Finish:
    """The job is over.

    Attributes:
        good: all steps were taken.
        why: in words.
        failure: of the member that is to blame: its trace; "" where there is none.
    """

    good: bool
    why: str
    failure: str = ""


Effect = Tell | Fence | SetClocks | Note | Finish
