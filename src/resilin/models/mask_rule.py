"""A mask as a rule: what it says of any few queries and keys can be made without the whole.

A whole mask has the square of a row's tokens, 16 GB for 128k of them; the rule has a few numbers for each token.

Shapes: B batch (1 where rows agree), T tokens, Q some queries, S some keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from resilin.models.groups import Groups


class Tile(NamedTuple):
    """Some queries and some keys, by their places in the tensors that hold them.

    Attributes:
        queries: first, and one behind the last.
        keys: first, and one behind the last.
        masked: whether some of the keys are, or may be, hidden from some of the queries.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    masked: bool


@dataclass(frozen=True)
class MaskRule:
    """Query q sees key s when s is not behind q, is in its document or the one it goes on from, and in its window.

    With groups, s is not behind the group of q.

    Attributes:
        tokens: T, of a whole row.
        window: a query sees itself and the window - 1 tokens before it; None: all before it.
        documents_BT: the number of each token's document; None: each row is one.
        continues_BT: the number of the document, earlier in the row, that a token's document goes on from; -1: none.
        positions_BT: where each token stands in its text; a window is measured by it where documents go on.
        groups: of tokens that see each other; None: every token is one.
    """

    tokens: int
    window: int | None = None
    documents_BT: Tensor | None = None
    continues_BT: Tensor | None = None
    positions_BT: Tensor | None = None
    groups: Groups | None = None

    def seen(self, query_Q: Tensor, key_S: Tensor) -> Tensor:
        """(B, Q, S) bool: whether each of some queries sees each of some keys.

        Args:
            query_Q: places in the row, int64.
            key_S: places in the row, int64.
        """
        seen_BQS = (query_Q[:, None] >= key_S)[None] if self.groups is None else self.groups.seen(query_Q, key_S)
        if self.documents_BT is not None:
            of_query_BQ1, of_key_B1S = self.documents_BT[:, query_Q, None], self.documents_BT[:, None, key_S]
            same_BQS = of_query_BQ1 == of_key_B1S
            if self.continues_BT is not None:
                before_BQ1 = self.continues_BT[:, query_Q, None]
                same_BQS = same_BQS | ((before_BQ1 == of_key_B1S) & (before_BQ1 >= 0))
            seen_BQS = seen_BQS & same_BQS
        if self.window is not None:
            by_place = self.continues_BT is None or self.positions_BT is None
            at_query_BQ = query_Q[None] if by_place else self.positions_BT[:, query_Q]  # type: ignore[index]
            at_key_BS = key_S[None] if by_place else self.positions_BT[:, key_S]  # type: ignore[index]
            seen_BQS = seen_BQS & (at_query_BQ[:, :, None] - at_key_BS[:, None] < self.window)
        return seen_BQS

    @cached_property
    def first_keys(self) -> Tensor:
        """(T,) int64 on the host: no query sees a key before this one, in any row."""
        place_T = torch.arange(self.tokens)
        first_T = torch.zeros_like(place_T)
        if self.continues_BT is not None:
            return first_T  # an earlier document may be anywhere
        if self.documents_BT is not None:
            first_T = torch.stack([_first_of_equals(row_T) for row_T in self.documents_BT.cpu()]).amin(0)
        if self.window is not None:
            first_T = first_T.maximum(place_T - self.window + 1)
        return first_T

    def tiles(
        self, queries: tuple[int, int], keys: tuple[int, int], query_step: int, key_step: int
    ) -> Iterator[tuple[tuple[int, int], list[Tile]]]:
        """The tiles in which anything may be seen, for a stretch of queries and one of keys.

        Args:
            queries: first place in the row, and one behind the last.
            keys: first place in the row, and one behind the last.
            query_step: queries of a tile, at most.
            key_step: keys of a tile, at most.

        Yields:
            Some queries and their tiles, counted from the beginning of the two stretches; those that see no key have
            an empty list.
        """
        plain = self.documents_BT is None and self.window is None and self.groups is None
        for start in range(*queries, query_step):
            stop = min(start + query_step, queries[1])
            behind = stop if self.groups is None else int(self.groups.last_keys[start:stop].max()) + 1
            low, high = max(int(self.first_keys[start:stop].min()), keys[0]), min(behind, keys[1])
            found = [
                Tile(
                    (start - queries[0], stop - queries[0]),
                    (at - keys[0], min(at + key_step, high) - keys[0]),
                    not plain or min(at + key_step, high) > start + 1,
                )
                for at in range(low, high, key_step)
            ]
            yield (start - queries[0], stop - queries[0]), found


def _first_of_equals(numbers_T: Tensor) -> Tensor:
    """(T,) int64: the first place at which each place's number stands."""
    _, which_T = torch.unique(numbers_T, return_inverse=True)
    place_T = torch.arange(len(numbers_T))
    first_N = torch.full_like(place_T, len(numbers_T)).scatter_reduce_(0, which_T, place_T, "amin")
    return first_N[which_T]
