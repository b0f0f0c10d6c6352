"""Which keys a query may see: those before it, in its own document or the one it goes on from, inside its window.

Shapes: B batch (1 where rows agree), Q queries, S keys, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from resilin.models.groups import Groups
from resilin.models.mask_rule import MaskRule
from resilin.models.spans import Span, spans_of

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


LARGEST = 2**24
"""Elements of a mask that is made whole: those of a row of 4,096 tokens. Beyond, its memory would limit the row."""


class Mask(NamedTuple):
    """What one layer's attention may see.

    Attributes:
        causal: the plain triangle over equally many queries and keys; then `seen_BQS` is None.
        seen_BQS: bool, True where query q sees key s; None with `causal` False: every query sees every key.
        block: the same for flex attention; None where another backend is to be used.
        spans: the same as stretches of tokens, for attention document by document; then the others say nothing.
        rule: the same as a rule from which the mask of any few queries and keys is made; then the others say nothing.
    """

    causal: bool
    seen_BQS: Tensor | None = None
    block: BlockMask | None = None
    spans: tuple[Span, ...] | None = None
    rule: MaskRule | None = None

    def dense(self, batch: int, tokens: int) -> Tensor | None:
        """`seen_BQS`, also where the mask is spans or a rule."""
        if self.rule is not None:
            documents_BT = self.rule.documents_BT
            place = torch.arange(tokens, device=None if documents_BT is None else documents_BT.device)
            return self.rule.seen(place, place)
        if self.spans is None:
            return self.seen_BQS
        seen_NN = torch.zeros(batch * tokens, batch * tokens, dtype=torch.bool)
        for start, stop, (first, last) in self.spans:
            seen_NN[start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
            seen_NN[start:stop, first:last] = True
        return torch.stack([seen_NN[at : at + tokens, at : at + tokens] for at in range(0, batch * tokens, tokens)])


def training_mask(
    documents_BT: Tensor | None,
    tokens: int,
    window: int | None,
    device: torch.device,
    continues_BT: Tensor | None = None,
    positions_BT: Tensor | None = None,
    groups: Groups | None = None,
) -> Mask:
    """The mask of whole texts: causal, inside a document (equal numbers), the last `window` tokens only.

    A token always sees itself, so no row is empty; padding is a document of its own, numbered -1.

    Args:
        documents_BT: None: each row is one document.
        tokens: T.
        window: None: no limit.
        device: of the mask.
        continues_BT: the document that a token's document goes on from, all of which it sees as well; -1: none.
        positions_BT: where each token stands in its text; a window is measured by it where documents go on.
        groups: of tokens that see each other.
    """
    wide = window is None or window >= tokens
    if documents_BT is None and wide and groups is None:
        return Mask(causal=True)
    mask = rule_mask(documents_BT, tokens, window, continues_BT, positions_BT, groups)
    assert mask.rule is not None
    batch = 1 if documents_BT is None else len(documents_BT)
    if groups is not None:
        batch = len(groups.ends_BT)
    if batch * tokens**2 > LARGEST:
        return mask
    place = torch.arange(tokens, device=device)
    return Mask(causal=False, seen_BQS=mask.rule.seen(place, place))


def rule_mask(
    documents_BT: Tensor | None,
    tokens: int,
    window: int | None,
    continues_BT: Tensor | None = None,
    positions_BT: Tensor | None = None,
    groups: Groups | None = None,
) -> Mask:
    """The mask of `training_mask` as a rule; its arguments are the same."""
    window = None if window is None or window >= tokens else window
    return Mask(causal=False, rule=MaskRule(tokens, window, documents_BT, continues_BT, positions_BT, groups))


def span_masks(
    documents_BT: Tensor, windows: set[int | None], continues_BT: Tensor | None = None
) -> dict[int | None, Mask]:
    """The masks of those windows that no document exceeds, as spans, or as the triangle where each row is a document.

    Args:
        documents_BT: on the host.
        windows: of the layers.
        continues_BT: as for `training_mask`.
    """
    spans = spans_of(documents_BT, continues_BT)
    if not spans:
        return {}
    longest = max(span.keys for span in spans)
    whole = len(spans) == len(documents_BT)
    mask = Mask(causal=True) if whole else Mask(causal=False, spans=spans)
    return {w: mask for w in windows if w is None or w >= longest}


def flex_mask(
    documents_BT: Tensor | None,
    tokens: int,
    window: int | None,
    device: torch.device,
    continues_BT: Tensor | None = None,
    positions_BT: Tensor | None = None,
    groups: Groups | None = None,
) -> Mask:
    """The same mask as blocks for flex attention, which skips blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = query >= key if groups is None else groups.sees(batch, query, key)
        if window is not None:
            by_place = continues_BT is None or positions_BT is None
            distance = query - key if by_place else positions_BT[batch, query] - positions_BT[batch, key]  # type: ignore[index]
            visible = visible & (distance < window)
        if documents_BT is not None:
            same = documents_BT[batch, query] == documents_BT[batch, key]
            if continues_BT is not None:
                goes_on = continues_BT[batch, query]
                same = same | ((goes_on == documents_BT[batch, key]) & (goes_on >= 0))
            visible = visible & same
        return visible

    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = seen
    batch = None if documents_BT is None else documents_BT.shape[0]
    if groups is not None:
        batch = len(groups.ends_BT)
    # Uncompiled, the blocks are found by making the whole mask.
    compiled = device.type == "cuda" and (batch or 1) * tokens**2 > LARGEST
    block = create_block_mask(rule, batch, None, tokens, tokens, device=str(device), _compile=compiled)
    return Mask(causal=False, block=block)


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
