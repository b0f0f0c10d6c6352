"""Ranks that save together, whose group is made once they do: most views of an elastic run end before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from resilin.checkpoint.coordinator import Coordinator
from resilin.checkpoint.errors import CheckpointError


class LateCoordinator:
    """A `Coordinator` that is made by its first call.

    Args:
        rank: of this process.
        world: how many ranks.
        make: makes it; all ranks call together, in whatever thread they save.
    """

    def __init__(self, rank: int, world: int, make: Callable[[], Coordinator]) -> None:
        self.rank, self.world, self._make = rank, world, make
        self._made: Coordinator | None = None

    def gather(self, value: Any) -> list[Any] | None:
        """As the one that is made."""
        return self._there().gather(value)

    def broadcast(self, value: Any) -> Any:
        """As the one that is made."""
        return self._there().broadcast(value)

    def _there(self) -> Coordinator:
        if self._made is None:
            try:
                self._made = self._make()
            except RuntimeError as error:
                raise CheckpointError(
                    f"rank {self.rank}: the ranks that save this checkpoint did not find each other ({error}); nothing "
                    "was written, and the checkpoints before it are still good"
                ) from error
        return self._made
