"""Ranks played by threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from resilin.checkpoint.coordinator import Threads


def outcomes(world: int, work: Callable[[Threads], Any]) -> list[Any]:
    """What `work` gives at each rank, errors as values."""

    def one(coordinator: Threads) -> Any:
        try:
            return work(coordinator)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, Threads.of(world, timeout=20)))


def as_ranks(world: int, work: Callable[[Threads], Any]) -> list[Any]:
    """What `work` gives at each rank; the first error, where one fails."""
    results = outcomes(world, work)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
