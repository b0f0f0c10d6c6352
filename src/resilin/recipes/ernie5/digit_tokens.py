"""Handwritten digits as bytes, for a decoder: four pixels of four shades to a byte, and the digit after the last.

Shapes: B images, T bytes of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resilin.data.settings import SourceContext
from resilin.nouns import Batch
from resilin.objective.next_token import IGNORE
from resilin.recipes.elaswave.digits import SIDE, Digits
from resilin.transforms import SourceTransform

SHADES, PIXELS = 4, 4


class DigitTokens(Digits):
    """scikit-learn's digits, 16 bytes each; what is foretold is the digit alone, a byte from 0 to 9."""

    def build(self, context: SourceContext) -> DigitTokenSource:  # type: ignore[override]
        """The source of one split."""
        return DigitTokenSource(super().build(context))


class DigitTokenSource(SourceTransform):
    """Images as tokens."""

    vocab_size = SHADES**PIXELS

    def shown(self, step: int | None, batch: Batch) -> Batch:
        """`tokens` and `labels` (B, T) in place of pixels."""
        tokens_BT = image_tokens(batch["inputs"])
        labels_BT = torch.full_like(tokens_BT, IGNORE)
        labels_BT[:, -1] = batch["labels"]
        return Batch(batch.slots_B, {"tokens": tokens_BT, "labels": labels_BT})


def image_tokens(pixels_B1HW: Tensor) -> Tensor:
    """(B, 1, 8, 8) in [0, 1] -> (B, 16) int64, row by row."""
    assert pixels_B1HW.shape[1:] == (1, SIDE, SIDE)
    shades_BTP = (pixels_B1HW * SHADES).long().clamp(max=SHADES - 1).view(len(pixels_B1HW), -1, PIXELS)
    return (shades_BTP * SHADES ** torch.arange(PIXELS)).sum(-1)
