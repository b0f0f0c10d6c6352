"""Which keys a query may see: those before it, in its own document, inside its window.

Shapes: B batch (1 where rows agree), Q queries, S keys, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Mask(NamedTuple):
    """What one layer's attention may see.

    Attributes:
        causal: the plain triangle over equally many queries and keys; then `seen_BQS` is None.
        seen_BQS: bool, True where query q sees key s; None with `causal` False: every query sees every key.
        block: the same for flex attention; None where another backend is to be used.
    """

    causal: bool
    seen_BQS: Tensor | None = None
    block: BlockMask | None = None


def training_mask(documents_BT: Tensor | None, tokens: int, window: int | None, device: torch.device) -> Mask:
    """The mask of whole texts: causal, inside a document (equal numbers), the last `window` tokens only.

    A token always sees itself, so no row is empty; padding is a document of its own, numbered -1.
    """
    wide = window is None or window >= tokens
    if documents_BT is None and wide:
        return Mask(causal=True)
    place = torch.arange(tokens, device=device)
    seen = place[:, None] >= place
    if window is not None and not wide:
        seen &= place[:, None] - place < window
    seen_BQS = seen[None]
    if documents_BT is not None:
        seen_BQS = seen_BQS & (documents_BT[:, :, None] == documents_BT[:, None, :])
    return Mask(causal=False, seen_BQS=seen_BQS)


def flex_mask(documents_BT: Tensor | None, tokens: int, window: int | None, device: torch.device) -> Mask:
    """The same mask as blocks for flex attention, which skips blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = query >= key
        if window is not None:
            visible = visible & (query - key < window)
        if documents_BT is not None:
            visible = visible & (documents_BT[batch, query] == documents_BT[batch, key])
        return visible

    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = seen
    batch = None if documents_BT is None else documents_BT.shape[0]
    return Mask(causal=False, block=create_block_mask(rule, batch, None, tokens, tokens, device=str(device)))


def cached_mask(slots_BT: Tensor, reach: int, ragged: bool, window: int | None) -> Mask:
    """The mask of new tokens at `slots_BT` over the first `reach` slots of a cache (their own included)."""
    tokens = slots_BT.shape[1]
    wide = window is None or window >= reach
    if not ragged and wide:
        if tokens == reach:
            return Mask(causal=True)
        if tokens == 1:
            return Mask(causal=False)
    key = torch.arange(reach, device=slots_BT.device)
    seen_BQS = slots_BT[:, :, None] >= key
    if window is not None and not wide:
        seen_BQS = seen_BQS & (slots_BT[:, :, None] - key < window)
    return Mask(causal=False, seen_BQS=seen_BQS)
