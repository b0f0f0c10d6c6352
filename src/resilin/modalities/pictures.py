"""Pictures in a decoder: features of coarser scales go in, the bits of this scale's tokens come out.

A token of b bits stands for 2^b words without a table of them: one logistic classifier for each bit (Han et al.,
"Infinity", 2024, section 3.2). Bits of a token are independent given what the decoder has seen.

Shapes: N positions of pictures, F features, D hidden size, d bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from resilin.config import Settings
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.linear import Linear


class PicturePartSettings(Settings):
    """How pictures go in and out."""

    bits: int = Field(ge=1)
    """Bits of a token, as many as the tokenizer can give."""


class PicturePart(nn.Module):
    """Projections of a picture's tokens into the stream, and out of it."""

    def __init__(self, settings: PicturePartSettings, decoder: DecoderSettings) -> None:
        super().__init__()
        self.bits = settings.bits
        # What the picture so far says, what the frame before says, and which of the two there is.
        self.enter = Linear(2 * settings.bits + 2, decoder.hidden_size, bias=True)
        self.leave = Linear(decoder.hidden_size, settings.bits, bias=True)

    @property
    def features(self) -> int:
        """F."""
        return 2 * self.bits + 2

    def embedded(self, features_NF: Tensor) -> Tensor:
        """(N, D): what goes into the stream."""
        entered: Tensor = self.enter(features_NF.to(self.enter.weight.dtype))
        return entered

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, d) in float32 at least: of each bit being 1."""
        logits_Nd: Tensor = self.leave(hidden_ND)
        return logits_Nd.to(torch.promote_types(logits_Nd.dtype, torch.float32))


def bit_losses(logits_Nd: Tensor, bits_Nd: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """(N,) each: the mean cross-entropy of a token's bits in nats, and the share that is guessed right.

    Args:
        logits_Nd: of each bit being 1.
        bits_Nd: bool.
        active: how many leading bits there are now; the others are not asked.
    """
    logits_Na, bits_Na = logits_Nd[:, :active], bits_Nd[:, :active]
    nll_Na = F.binary_cross_entropy_with_logits(logits_Na, bits_Na.to(logits_Na.dtype), reduction="none")
    return nll_Na.mean(1), ((logits_Na > 0) == bits_Na).double().mean(1)
