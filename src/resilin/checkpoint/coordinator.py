"""How the processes of one save agree: a few small messages through one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from resilin.checkpoint.errors import CheckpointError


class Coordinator(Protocol):
    """The processes that save one checkpoint together; rank 0 leads.

    Values are JSON trees. Every rank makes the same calls in the same order, from one thread at a time.
    """

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def world(self) -> int:
        """How many there are."""

    def gather(self, value: Any) -> list[Any] | None:
        """At rank 0 the values of all, by rank; None at the others."""

    def broadcast(self, value: Any) -> Any:
        """What rank 0 gave, at every rank."""


class Alone:
    """One process that has everything."""

    rank, world = 0, 1

    def gather(self, value: Any) -> list[Any] | None:
        """Its own."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Its own."""
        return value


class Threads:
    """Threads of one process that play ranks: `Threads.of(4)` gives four of them. For tests and simulations."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world = rank, len(board)
        self._board, self._barrier = board, barrier

    @classmethod
    def of(cls, world: int, timeout: float = 60.0) -> list[Threads]:
        """One for each rank; a rank that does not come within `timeout` seconds fails the others."""
        board: list[Any] = [None] * world
        barrier = threading.Barrier(world, timeout=timeout)
        return [cls(rank, board, barrier) for rank in range(world)]

    def _meet(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise CheckpointError(f"rank {self.rank}: another rank did not come to save its part") from None

    def leave(self) -> None:
        """Be gone, as a killed process is: who waits for this rank fails."""
        self._barrier.abort()

    def gather(self, value: Any) -> list[Any] | None:
        """Over a shared list."""
        self._board[self.rank] = value
        self._meet()
        found = list(self._board) if self.rank == 0 else None
        self._meet()
        return found

    def broadcast(self, value: Any) -> Any:
        """Over the first place of the list."""
        if self.rank == 0:
            self._board[0] = value
        self._meet()
        found = self._board[0]
        self._meet()
        return found


def together(coordinator: Coordinator, mine: Callable[[], Any], lead: Callable[[list[Any]], Any]) -> Any:
    """Every rank does its part; where all succeed, rank 0 concludes. All return what it returns, or all fail.

    Args:
        coordinator: of the ranks.
        mine: this rank's part; gives a JSON value.
        lead: from the values of all, by rank; called at rank 0. Gives a JSON value.

    Raises:
        CheckpointError: naming the rank whose part failed; at that rank, its own error.
    """
    error: BaseException | None = None
    value: Any = None
    try:
        value = mine()
        if coordinator.world == 1:
            return lead([value])
    except BaseException as caught:
        if coordinator.world == 1:
            raise
        error = caught
    parts = coordinator.gather({"value": value} if error is None else {"error": _in_words(error)})
    answer: dict[str, Any] = {}
    if parts is not None:
        failed = [f"rank {rank}: {part['error']}" for rank, part in enumerate(parts) if "error" in part]
        if failed:
            answer = {"error": failed[0] + (f" (and {len(failed) - 1} other ranks)" if len(failed) > 1 else "")}
        else:
            try:
                answer = {"value": lead([part["value"] for part in parts])}
            except BaseException as caught:
                error, answer = caught, {"error": f"rank 0: {_in_words(caught)}"}
    answer = coordinator.broadcast(answer)
    if error is not None:
        raise error
    if "error" in answer:
        raise CheckpointError(answer["error"])
    return answer["value"]


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
