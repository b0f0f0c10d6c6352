"""Small rows of all kinds of tokens, and a decoder for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from resilin.modalities.model import GroupDecoder, GroupDecoderSettings
from resilin.modalities.mtp import MtpSettings
from resilin.modalities.pictures import PicturePartSettings
from resilin.modalities.scale_tokens import ScaleTokenizer, fit
from resilin.modalities.sequence import Document, Frames, Sound, Words, row_of
from resilin.modalities.shape import PictureShape
from resilin.modalities.sound import SoundPartSettings
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.vision.digits import digit_pixels

SHAPE = PictureShape(((1, 1), (2, 2), (4, 4), (4, 4)))
WHOLE = PictureShape(SHAPE.scales, seen_whole=True)
LEVELS, CODES, VOCABULARY = 3, 8, 11


@cache
def digits() -> Tensor:
    """(1797, 1, 8, 8) in [0, 1]: the handwritten digits of scikit-learn."""
    return torch.from_numpy(digit_pixels()[0] / 16).float()[:, None]


@cache
def tokenizer(shape: PictureShape = SHAPE, bits: int = 4) -> ScaleTokenizer:
    return fit(digits()[:1400], shape, 2, bits)


def codes(frames: int, seed: int = 0) -> Tensor:
    return torch.randint(CODES, (frames, LEVELS), generator=torch.Generator().manual_seed(seed))


def batch_of(rows: list[list[Document]], length: int = 128, first_picture: int = 0, most: int = 0) -> Batch:
    """Rows of documents; their pictures are digits, one after another."""
    laid = [row_of(documents, length, LEVELS) for documents in rows]
    fields = {name: torch.stack([row[name] for row in laid]) for name in laid[0]}
    counts = [[n for document in row for seg in document if isinstance(seg, Frames) for n in range(seg.count)]
              for row in rows]  # fmt: skip
    most = max(most, *map(len, counts))
    if most:
        at = torch.arange(len(rows) * most).view(len(rows), most) + first_picture
        fields["pictures"] = digits()[at]
        fields["frame_numbers"] = torch.tensor([row + [-1] * (most - len(row)) for row in counts])
    return Batch(torch.arange(len(rows)), fields)


def mixed(shape: PictureShape = SHAPE) -> Batch:
    """Text, a picture amid text, sound, a video: two rows of two documents each."""
    first = [[Words([1, 2, 3]), Frames(1, shape), Words([4, 5, 6])], [Words([7, 1, 2, 9])]]
    second = [[Words([3]), Sound(codes(5)), Words([4, 7, 8, 9])], [Frames(2, shape)]]
    return batch_of([first, second])


def model_of(bits: int = 4, layers: int = 4, depth: int = 1, **changes: Any) -> GroupDecoder:
    own = {"vocab_size": VOCABULARY, "hidden_size": 24, "layers": layers, "heads": 2, "init_std": 0.3, **changes}
    settings = GroupDecoderSettings(
        decoder=DecoderSettings(**own),
        mtp=MtpSettings(depth=depth) if depth else None,
        pictures=PicturePartSettings(bits=bits),
        sound=SoundPartSettings(levels=LEVELS, codes=CODES),
    )
    return settings.build(ModelContext(0, None)).double()
