"""Where bytes live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["rank", "host", "file", "tier"]


@dataclass(frozen=True, order=True)
class Place:
    """One owner of memory: the device of a rank, its host memory, a file, or a tier of the memory ring.

    Two layouts mean the same memory when they mean the same place; moves between equal places cost nothing.

    Attributes:
        kind: what sort of owner.
        name: which one, such as "3" or "model.safetensors".
    """

    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def rank(number: int) -> Place:
    """The device memory of a rank."""
    return Place("rank", str(number))


def host(number: int) -> Place:
    """The host memory beside a rank."""
    return Place("host", str(number))


def file(name: str) -> Place:
    """A file."""
    return Place("file", name)
