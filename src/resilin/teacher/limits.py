"""How fast may be asked, and how long to wait after a failure."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from resilin.keys import hash64

Sleep = Callable[[float], Awaitable[None]]
Clock = Callable[[], float]


class PerMinute:
    """Lets through at most `most` units in any 60 seconds, in the order of asking.

    What alone costs more than that passes when nothing else did within the minute.
    """

    def __init__(self, most: float | None, *, clock: Clock = time.monotonic, sleep: Sleep = asyncio.sleep) -> None:
        self.most = most
        self._clock, self._sleep = clock, sleep
        self._spent: deque[tuple[float, float]] = deque()
        self._total = 0.0
        self._turn = asyncio.Lock()

    async def take(self, cost: float = 1.0) -> None:
        """Wait until `cost` units may be spent, and spend them."""
        if self.most is None:
            return
        async with self._turn:
            while True:
                now = self._clock()
                while self._spent and self._spent[0][0] <= now - 60.0:
                    self._total -= self._spent.popleft()[1]
                if not self._spent or self._total + cost <= self.most:
                    break
                await self._sleep(self._spent[0][0] + 60.0 - now)
            self._spent.append((self._clock(), cost))
            self._total += cost


def wait_before(attempt: int, key: str, first: float, longest: float, asked: float | None = None) -> float:
    """Seconds before the next try: 1, 2, 4, ... times `first`, at most `longest`, less a part of up to half.

    Args:
        attempt: tries that failed, from 1.
        key: decides the part, so that requests that failed together do not come back together.
        first: wait after the first failure.
        longest: the most.
        asked: what the endpoint asked for; never less than that, within `longest`.
    """
    wait = min(longest, first * 2.0 ** (attempt - 1))
    wait *= 1.0 - 0.5 * hash64("wait", key, attempt) / 2.0**64
    return wait if asked is None else min(longest, max(wait, asked))
