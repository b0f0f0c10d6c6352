"""Rows of tokens laid one behind another, without padding, and what they begin with in common laid down once.

Two answers to one prompt, or the eight of a group, are rows that begin alike. A causal model gives equal beginnings
equal hidden states, so the beginning is computed once, as a document of its own that each rest goes on from.

Shapes: R rows, T positions, N places of the joined row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_WORTH_SHARING = 4  # tokens: a shorter beginning costs about as much to attend to as to compute again


class JoinedRows(NamedTuple):
    """One row that holds all.

    Attributes:
        tokens_1N: ids.
        positions_1N: where each token stands in its own row.
        documents_1N: a number for each beginning and each rest.
        continues_1N: the number of the beginning that a rest goes on from; -1: none.
        place_RT: where the token of a row and position lies; -1 behind a row's end.
    """

    tokens_1N: Tensor
    positions_1N: Tensor
    documents_1N: Tensor
    continues_1N: Tensor
    place_RT: Tensor


def shared_beginnings(alike: Sequence[int], widths: Sequence[int]) -> list[tuple[range, int]]:
    """Neighbouring rows in groups, and how many tokens all of a group begin with (0: a row alone).

    Args:
        alike: how many tokens each row begins with in common with the row before it; the first is not looked at.
        widths: of each row.
    """
    groups: list[tuple[range, int]] = []
    start, common = 0, 0
    for row in range(1, len(widths) + 1):
        size = row - start
        if row < len(widths):
            # All of a group begin like the shortest agreement of neighbours. A row joins where that saves more
            # tokens (the beginning, once for each row but one) than the group saves without it.
            with_it = min(alike[row], widths[row - 1], widths[row], common if size > 1 else widths[start])
            if with_it >= _WORTH_SHARING and size * with_it > (size - 1) * common:
                common = with_it
                continue
        groups.append((range(start, row), common if size > 1 else 0))
        start, common = row, 0
    return groups


def join_rows(tokens_RT: Tensor, widths: Sequence[int]) -> JoinedRows:
    """Rows as one.

    Args:
        tokens_RT: ids, on the host.
        widths: how many tokens of each row count; a row of 0 has no place.
    """
    alike = [0, *(tokens_RT[1:] == tokens_RT[:-1]).long().cumprod(1).sum(1).tolist()]
    place_RT = torch.full(tokens_RT.shape, -1, dtype=torch.int64)
    tokens, positions, documents, continues = [], [], [], []
    at = number = 0

    def lay(row: int, first: int, last: int, parent: int) -> None:
        nonlocal at, number
        size = last - first
        tokens.append(tokens_RT[row, first:last])
        positions.append(torch.arange(first, last))
        documents.append(torch.full((size,), number))
        continues.append(torch.full((size,), parent))
        at, number = at + size, number + 1

    for rows, common in shared_beginnings(alike, widths):
        parent = -1
        if common:
            place_RT[rows.start : rows.stop, :common] = torch.arange(at, at + common)
            parent = number
            lay(rows.start, 0, common, -1)
        for row in rows:
            if widths[row] > common:
                place_RT[row, common : widths[row]] = torch.arange(at, at + widths[row] - common)
                lay(row, common, widths[row], parent)
    empty = torch.empty(0, dtype=torch.int64)
    laid = [torch.cat([empty, *pieces])[None] for pieces in (tokens, positions, documents, continues)]
    return JoinedRows(laid[0], laid[1], laid[2], laid[3], place_RT)
