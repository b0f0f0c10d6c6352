"""Which heads each rank attends with, for any number of heads and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from resilin.parallel.errors import ParallelError


@dataclass(frozen=True, slots=True)
class HeadShares:
    """The heads of each rank, in order: [first, one behind the last) of the query heads and of the key heads they read.

    Attributes:
        queries: of each rank; they divide the heads, the first ranks having one more where they do not divide evenly.
        keys: of each rank; neighbours overlap where a key head's queries lie on both.
        group: query heads that read one key head.
    """

    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]
    group: int

    @property
    def overlap(self) -> bool:
        """Whether some key head is on several ranks."""
        return any(left[1] > right[0] for left, right in zip(self.keys, self.keys[1:], strict=False))

    def counts(self, rank: int) -> tuple[int, int]:
        """How many query and key heads a rank has."""
        (first, last), (low, high) = self.queries[rank], self.keys[rank]
        return last - first, high - low

    def reads(self, rank: int) -> list[int] | None:
        """Which of its key heads each query head of a rank reads; None: the usual way, equally many to each in turn."""
        first, last = self.queries[rank]
        read = [head // self.group - self.keys[rank][0] for head in range(first, last)]
        count, keys = self.counts(rank)
        usual = count % keys == 0 and read == [head // (count // keys) for head in range(count)]
        return None if usual else read


@lru_cache
def share_heads(heads: int, key_heads: int, ranks: int) -> HeadShares:
    """Query heads in runs as equal as can be, and the key heads that each run reads.

    Raises:
        ParallelError: there are more ranks than query heads.
    """
    if ranks > heads:
        raise ParallelError(
            f"a row cannot be divided over {ranks} ranks by heads: the model has {heads} on each; use at most {heads}, "
            "or parallel.context_kind = 'ring'"
        )
    base, more = divmod(heads, ranks)
    group = heads // key_heads
    ends = [(rank + 1) * base + min(rank + 1, more) for rank in range(ranks)]
    queries = tuple(zip([0, *ends[:-1]], ends, strict=True))
    keys = tuple((first // group, (last - 1) // group + 1) for first, last in queries)
    return HeadShares(queries, keys, group)
