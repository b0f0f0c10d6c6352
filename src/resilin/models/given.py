"""What a model around a decoder decides in its place: embedded values, groups, and what happens between blocks.

Models whose sequences hold more than text embed each kind by itself and let the decoder's blocks work on all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from resilin.config import UserError
from resilin.models.cut import cut_of
from resilin.models.groups import Groups


class GivenError(UserError, ValueError):
    """A decoder that cannot be used by a model around it as it stands; the text says what stands in the way."""


@dataclass(frozen=True)
class Given:
    """What the decoder is to take.

    Attributes:
        embedded_BTD: in place of its own embedding of the tokens; None: its own.
        groups: of tokens that see each other; None: every token is one.
        after_block: (block's number, residual stream (B, T, D)) -> the stream the next block gets; None: the same.
    """

    embedded_BTD: Tensor | None = None
    groups: Groups | None = None
    after_block: Callable[[int, Tensor], Tensor] | None = None

    def after(self, layer: int, x_BTD: Tensor) -> Tensor:
        """The stream after a block, also one that is skipped, as the next one gets it."""
        return x_BTD if self.after_block is None else self.after_block(layer, x_BTD)


def check_given(decoder: Any, cache: object | None) -> None:
    """Refuse what nobody has defined for groups.

    Raises:
        GivenError: naming it.
    """
    settings, cut = decoder.settings, cut_of(decoder)
    reasons = (
        (hasattr(settings, "pattern"), f"a {type(decoder).__name__} goes through its tokens in order"),
        (cache is not None, "a cache of keys and values holds no groups: read the whole row again for each group"),
        (decoder.sequence is not None, "its rows are divided over ranks: use parallel.context = 1"),
        (decoder.span is not None, "its blocks are divided over stages: use parallel.pipeline = 1"),
        (settings.chains is not None, "its widths are chains (model.chains): leave them out"),
        (settings.loop is not None, "it is looped (model.loop): leave that out"),
        (
            cut is not None and cut.hidden != settings.hidden_size,
            "a budget narrows its stream: budgets of depth, heads, feed-forwards and experts can be run",
        ),
    )
    for stands, why in reasons:
        if stands:
            raise GivenError(f"a decoder with groups, or with values embedded elsewhere: {why}")
