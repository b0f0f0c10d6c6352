"""The pictures of a batch of rows, encoded with or without flipped bits.

A batch holds `pictures` (B, F, C, H, W) and `frame_numbers` (B, F) int64: the number of each picture in its video, 0
where one begins, -1 where the row has no more. The picture positions of a row, in order, are the places of its
pictures.

Shapes: B rows, F pictures of a row at most, P pictures of all rows, N places of a picture, d bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from resilin.keys import Keys
from resilin.modalities.scale_tokens import ScaleTokenizer
from resilin.modalities.sequence import PICTURE
from resilin.nouns import Batch


@dataclass(frozen=True)
class PictureBatch:
    """What a model is given of the pictures, and asked.

    Attributes:
        features_PNF, bits_PMd: see `resilin.modalities.scale_tokens.EncodedPictures`.
        counts_B: pictures of each row, int64.
    """

    features_PNF: Tensor
    bits_PMd: Tensor
    counts_B: Tensor


@dataclass(frozen=True)
class PictureNoise:
    """Which bits of a history are wrong.

    Attributes:
        keys: of the rows.
        most: each picture's share of flipped bits is drawn between 0 and this.
    """

    keys: Keys
    most: float

    def flips(self, tokenizer: ScaleTokenizer, there_BF: Tensor) -> list[Tensor] | None:
        """For each scale bool (P, d, h, w)."""
        if not self.most:
            return None
        own, pictures, device = self.keys.fold("flips"), there_BF.shape[1], there_BF.device
        rate_P = own.fold("share").uniform((pictures,), device)[there_BF] * self.most
        return [
            own.fold(scale).uniform((pictures, tokenizer.bits, *grid), device)[there_BF] < rate_P[:, None, None, None]
            for scale, grid in enumerate(tokenizer.shape.scales)
        ]


def read_pictures(
    batch: Batch, tokenizer: ScaleTokenizer, active: int | None = None, noise: PictureNoise | None = None
) -> PictureBatch:
    """The pictures of a batch as features and targets.

    Args:
        batch: of rows with pictures, or with room for them.
        tokenizer: of the pictures.
        active: leading bits in use; None: all.
        noise: None: no bit is flipped.

    Raises:
        ValueError: there are more or fewer positions than the pictures have places.
    """
    numbers_BF = batch["frame_numbers"]
    there_BF = numbers_BF >= 0
    places = int((batch["modality"] == PICTURE).sum())
    count = int(there_BF.sum())
    if places != count * tokenizer.shape.places:
        raise ValueError(
            f"{places} positions for {count} pictures of {tokenizer.shape.places} places each: rows were laid out for "
            "another tokenizer"
        )
    flips = noise.flips(tokenizer, there_BF) if noise is not None else None
    begins_P = numbers_BF[there_BF] == 0
    found = tokenizer.encode(batch["pictures"][there_BF].float(), begins_P, active, flips)
    return PictureBatch(found.features_PNF, found.bits_PMd, there_BF.sum(1))
