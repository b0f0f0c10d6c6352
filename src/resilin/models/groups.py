"""Tokens in groups that are predicted together: who sees whom.

A group is a run of neighbouring tokens: all tokens of one scale of one picture, one frame of sound, or one token of
text. Attention goes both ways inside a group and backwards between groups (Tian et al., "Visual autoregressive
modeling", 2024, figure 4). Because groups are runs, one number a token says it all: the place of the last token of its
group is the last place it sees. Text, whose groups are single tokens, is then the ordinary triangle.

A video adds two things: a window over frames leaves a gap of places that a query does not see, and frames of the past
may be hidden at random.

Shapes: B rows, T tokens, Q some queries, S some keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """What tokens see beside the rules of documents and windows.

    Attributes:
        ends_BT: int64, the last place of each token's group, not before its own.
        gap_BT2: int64, the first place a token does not see and the first it sees again; equal: no gap. None: nobody
            has one.
        hidden_BT: bool, tokens of past frames that other frames do not see; None: none. Needs `frames_BT`.
        frames_BT: int64, which frame of its row a token is of; -1: of none, which sees hidden ones too.
    """

    ends_BT: Tensor
    gap_BT2: Tensor | None = None
    hidden_BT: Tensor | None = None
    frames_BT: Tensor | None = None

    def seen(self, query_Q: Tensor, key_S: Tensor) -> Tensor:
        """(B, Q, S) bool: what the order of groups, gaps and hidden frames leave.

        Args:
            query_Q: places in the row, int64.
            key_S: places in the row, int64.
        """
        seen_BQS = key_S[None, None] <= self.ends_BT[:, query_Q, None]
        if self.gap_BT2 is not None:
            first_BQ, behind_BQ = self.gap_BT2[:, query_Q].unbind(-1)
            seen_BQS &= (key_S < first_BQ[..., None]) | (key_S >= behind_BQ[..., None])
        if self.hidden_BT is not None:
            assert self.frames_BT is not None
            of_query_BQ1, of_key_B1S = self.frames_BT[:, query_Q, None], self.frames_BT[:, None, key_S]
            seen_BQS &= ~(self.hidden_BT[:, None, key_S] & (of_query_BQ1 >= 0) & (of_query_BQ1 != of_key_B1S))
        return seen_BQS

    def sees(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The same for single numbers, as flex attention asks."""
        visible = key <= self.ends_BT[batch, query]
        if self.gap_BT2 is not None:
            visible = visible & ((key < self.gap_BT2[batch, query, 0]) | (key >= self.gap_BT2[batch, query, 1]))
        if self.hidden_BT is not None and self.frames_BT is not None:
            of_query = self.frames_BT[batch, query]
            other = (of_query >= 0) & (of_query != self.frames_BT[batch, key])
            visible = visible & ~(self.hidden_BT[batch, key] & other)
        return visible

    @cached_property
    def last_keys(self) -> Tensor:
        """(T,) int64 on the host: no query sees a key behind this one, in any row."""
        return self.ends_BT.amax(0).cpu()


def ends_of(groups_BT: Tensor) -> Tensor:
    """(B, T) int64: the last place of each token's group.

    Args:
        groups_BT: any integers; neighbours with equal numbers are of one group.
    """
    T = groups_BT.shape[1]
    place_T = torch.arange(T, device=groups_BT.device)
    last_BT = torch.ones_like(groups_BT, dtype=torch.bool)
    last_BT[:, :-1] = groups_BT[:, 1:] != groups_BT[:, :-1]
    # Of the places at which groups end, the first that is not before each token.
    return torch.where(last_BT, place_T, T).flip(1).cummin(1).values.flip(1)


def frame_gaps(frames_BT: Tensor, videos_BT: Tensor, window: int) -> Tensor:
    """(B, T, 2) int64: the gap of a window over frames; a token sees its own frame and the window - 1 before it.

    What lies outside the token's video (text before it, other pictures) stays in sight.

    Args:
        frames_BT: int64, which frame of its row a token is of, ascending through the row; -1: of none.
        videos_BT: int64, the first frame of the token's video; anything where there is none.
        window: at least 1.
    """
    oldest_BT = (frames_BT - window + 1).maximum(videos_BT)
    none_BT = frames_BT < 0

    def first_place(wanted_BT: Tensor) -> Tensor:
        # Frames ascend and -1 lies between them: made ascending, the first place of a frame is found by bisection.
        ascending_BT = frames_BT.cummax(1).values.contiguous()
        return torch.searchsorted(ascending_BT, wanted_BT.contiguous())

    gap_BT2 = torch.stack((first_place(videos_BT), first_place(oldest_BT)), -1)
    return gap_BT2.masked_fill(none_BT[..., None], 0)
