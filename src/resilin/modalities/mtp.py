"""Multi-token prediction: small modules behind a decoder that predict the tokens after the next one.

Depth k joins what depth k - 1 says of a token with the embedding of the token k places on, runs one block and predicts
the token k + 1 places on through the decoder's own head (DeepSeek-V3, 2024, section 2.2, equations 21 to 25):

    h'_t = M_k [norm(h_t); norm(Emb(x_{t+k}))],   h^k = block_k(h'),   p(x_{t+k+1}) = head(norm(h^k_t))

The chain of causes stays whole: depth k sees nothing beyond x_{t+k}. Embedding and head are the decoder's; the modules
are dropped when it is exported.

Shapes: B rows, T positions, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.config import Settings
from resilin.keys import Keys
from resilin.models.block import Block
from resilin.models.cache import KVCache
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.linear import Linear
from resilin.models.mask import Mask
from resilin.models.norm import stream_norm
from resilin.models.recompute import run_block
from resilin.models.rope import Rotation
from resilin.nouns import Batch

IGNORED = -100


class MtpSettings(Settings):
    """How many tokens beyond the next one are predicted."""

    depth: int = Field(default=1, ge=1)
    """Modules, each of which predicts one token more."""


class MtpModule(nn.Module):
    """One depth."""

    def __init__(self, settings: DecoderSettings, depth: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        settings = settings.model_copy(update={"layer_sizes": ()})
        self.settings, self.depth = settings, depth
        self.state_norm = stream_norm(settings, device)
        self.token_norm = stream_norm(settings, device)
        self.join = Linear(2 * settings.hidden_size, settings.hidden_size, bias=False, device=device)
        self.block = Block(settings, settings.layers - 1, device)  # the last one's kind: with experts or without
        self.block.attention.layer = 0  # its keys and values lie in a cache of their own
        self.norm = stream_norm(settings, device)

    def forward(
        self, state_BTD: Tensor, token_BTD: Tensor, turn: Rotation, mask: Mask, keys: Keys | None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream (B, T, D) of this depth, and the router's logits where its block has experts.

        Args:
            state_BTD: of the depth before.
            token_BTD: the embedding of the token `depth` places on; zeros where there is none.
            turn: of the decoder.
            mask: of its last layer.
            keys: for dropout.
        """
        joined_BTD = self._joined(state_BTD, token_BTD)
        own = None if keys is None else keys.fold("mtp").fold(self.depth)
        found: tuple[Tensor, Tensor | None] = run_block(
            self.settings.recompute, self.block, joined_BTD, turn, mask, own
        )
        return found

    def read(
        self, state_BTD: Tensor, token_BTD: Tensor, turn: Rotation, mask: Mask, cache: KVCache, slots_BT: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As a call, of tokens that follow those whose keys and values are in a cache of this module's own."""
        found: tuple[Tensor, Tensor | None] = self.block(
            self._joined(state_BTD, token_BTD), turn, mask, None, cache, slots_BT
        )
        return found

    def _joined(self, state_BTD: Tensor, token_BTD: Tensor) -> Tensor:
        joined_BTD: Tensor = self.join(torch.cat((self.state_norm(state_BTD), self.token_norm(token_BTD)), -1))
        return joined_BTD


class Further(NamedTuple):
    """What depth `by` reads and is asked, each (B, T).

    Attributes:
        tokens_BT: int64, the token `by` places on, 0 where there is none.
        there_BT: bool, whether there is one: text all the way, and one document.
        labels_BT: int64, the token behind that one; -100: not asked.
        weights_BT: that label's share in the loss, or None for 1.
    """

    tokens_BT: Tensor
    there_BT: Tensor
    labels_BT: Tensor
    weights_BT: Tensor | None


def further(batch: Batch, by: int, text_BT: Tensor | None = None) -> Further:
    """The tokens and labels of a depth.

    Args:
        batch: with `tokens`, `labels` and, where they are there, `documents` and `weights`.
        by: the depth, at least 1.
        text_BT: which positions are text; None: all.
    """
    tokens_BT, labels_BT, documents_BT = batch["tokens"], batch["labels"], batch.get("documents")
    T = tokens_BT.shape[1]
    there_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    if by < T:
        rest = slice(0, T - by)
        there_BT[:, rest] = True
        for step in range(by + 1):
            if text_BT is not None:
                there_BT[:, rest] &= text_BT[:, step : T - by + step]
            if documents_BT is not None:
                there_BT[:, rest] &= documents_BT[:, step : T - by + step] == documents_BT[:, rest]

    def moved(x_BT: Tensor, without: int) -> Tensor:
        return x_BT.roll(-by, 1).where(there_BT, without)

    weights_BT = batch.get("weights")
    return Further(
        moved(tokens_BT, 0),
        there_BT,
        moved(labels_BT, IGNORED),
        None if weights_BT is None else moved(weights_BT, 0),
    )
