"""Which expert leaves the host cache when another comes (SE-MoE, Shen et al., 2022, algorithm 2, its gaps filled)."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Key = tuple[int, int]
"""Layer and expert."""
Kind = Literal["lfu", "lru"]


class Decision(NamedTuple):
    """What a request does to the cache.

    Attributes:
        hit: it was there.
        cached: it is there now.
        evicted: who left for it.
    """

    hit: bool
    cached: bool
    evicted: Key | None = None


@dataclass
class CachePolicy:
    """The least frequently used entry goes, where old uses count less and less.

    Exactly one entry is evicted: of those that are not pinned and have at least `threshold` hits (of all that are not
    pinned, where none has) the one with the fewest hits, the oldest of equals. A newcomer has one hit. After every
    `period` requests all hits are multiplied by `decay`. Where all are pinned, the newcomer is not cached.

    Attributes:
        capacity: entries.
        kind: "lfu", or "lru": the least recently used goes, and hits count for nothing.
        threshold: above 1 it protects newcomers, which can lower the hit rate.
        period: requests between decays.
        decay: in (0, 1]; 1 forgets nothing.
    """

    capacity: int
    kind: Kind = "lfu"
    threshold: float = 1.0
    period: int = 100
    decay: float = 0.5
    hits: dict[Key, float] = field(default_factory=dict, init=False)
    _since: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.capacity < 0 or self.period < 1 or not 0 < self.decay <= 1:
            raise ValueError(
                f"a cache of {self.capacity} entries with period {self.period} and decay {self.decay}: capacity should "
                "be at least 0, period at least 1, decay above 0 and at most 1"
            )

    def get(self, key: Key, pinned: Container[Key] = ()) -> Decision:
        """Note a request, and make room for it if there has to be.

        Args:
            key: asked for.
            pinned: may not be evicted.
        """
        decision = self._place(key, pinned)
        self._since += 1
        if self._since == self.period:
            self._since = 0
            if self.decay != 1 and self.kind == "lfu":
                for known in self.hits:
                    self.hits[known] *= self.decay
        return decision

    def _place(self, key: Key, pinned: Container[Key]) -> Decision:
        if key in self.hits:
            if self.kind == "lru":  # the order of the dictionary is that of uses
                self.hits[key] = self.hits.pop(key)
            else:
                self.hits[key] += 1
            return Decision(hit=True, cached=True)
        evicted = None
        if len(self.hits) >= self.capacity:
            evicted = self._victim(pinned)
            if evicted is None:
                return Decision(hit=False, cached=False)
            del self.hits[evicted]
        self.hits[key] = 1.0
        return Decision(hit=False, cached=True, evicted=evicted)

    def _victim(self, pinned: Container[Key]) -> Key | None:
        free = [key for key in self.hits if key not in pinned]
        if self.kind == "lru":
            return free[0] if free else None
        proven = [key for key in free if self.hits[key] >= self.threshold]
        return min(proven or free, key=self.hits.__getitem__, default=None)  # the first of equals is the oldest
