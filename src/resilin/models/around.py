"""Modules that stand around a decoder, and are used like it: what is asked of them the decoder answers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from resilin.keys import Keys
from resilin.models.decoder import Decoder

# Shapes: B rows, T positions, D hidden size, V vocabulary.


class AroundDecoder(nn.Module):
    """The decoder, called and asked; what a class has besides is its own."""

    @property
    @abstractmethod
    def inner(self) -> Decoder:
        """The decoder."""

    @property
    def settings(self) -> Any:
        """The decoder's."""
        return self.inner.settings

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the decoder's."""
        return self.inner.head_weight

    @property
    def vocabulary_shard(self) -> Any:
        """The part of the vocabulary that the decoder's head computes; None: all of it."""
        return getattr(self.inner, "vocabulary_shard", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """The decoder's."""
        return self.inner.logits(hidden)

    def plain_form(self) -> nn.Module:
        """The decoder: what writes and is kept."""
        return self.inner

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        *,
        keys: Keys | None = None,
        **more: Any,
    ) -> Any:
        """What the decoder gives."""
        return self.inner(tokens_BT, positions_BT, documents_BT, keys=keys, **more)
