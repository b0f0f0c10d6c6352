"""Pictures and video that are looked at, not predicted: features of a CNN and of a ViT, some patches to a token.

A token is a square of patches, of one frame (4 patches) or of several frames of a video (16 patches of 4 frames). Each
patch has two vectors, one from a vision transformer over its frame and one from a convolutional network, brought to the
transformer's width. The 2K vectors of a token attend to each other once; their mean, projected, goes into the decoder's
stream (ERNIE 5.0, section 3). All of it is trained with the decoder.

How the two networks look is not told; here the ViT is that of `resilin.vision.vit`, and the CNN is two 3x3 convolutions
and one that steps by patches. What tells the vectors of a token apart (frame, place, network) is an embedding of ours.

Shapes: P frames, C channels, H, W pixels, h, w tokens of a frame, n = h * w, k patches of a token in a frame, K = k
times the frames of a token, B bundles of frames, N tokens, V width of the vision transformer, D that of the decoder.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.config import Settings
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.linear import Linear
from resilin.vision.initial import fill_convolutional, fill_transformer
from resilin.vision.vit import Block, VisionTransformer, ViT

Positive = Annotated[int, Field(ge=1)]


class SeenPartSettings(Settings):
    """How pictures that are looked at go in."""

    size: Positive
    """Height and width in pixels that the position embeddings are for; others are resampled."""
    channels: Positive = 3
    """Of the pictures."""
    patch: Positive = 16
    """Pixels of a patch's side."""
    side: Positive = 2
    """Patches of a token's side, as `source.seen.cell` / `patch` says."""
    frames: Positive = 4
    """Frames of a video that share a token, at most."""
    width: Positive = 768
    """Of the vision transformer."""
    layers: Positive = 12
    """Of the vision transformer."""
    heads: Positive = 12
    """Of the vision transformer, and of the attention inside a token."""
    filters: Positive = 64
    """Channels of the convolutional network."""

    @model_validator(mode="after")
    def _even(self) -> SeenPartSettings:
        if self.size % (self.patch * self.side):
            cell = self.patch * self.side
            raise ValueError(f"size = {self.size} is no multiple of a token's {cell} pixels (patch * side): change one")
        return self

    def vit(self) -> ViT:
        """The vision transformer's own settings; nobody asks for its classes."""
        return ViT(
            classes=1, size=self.size, patch=self.patch, channels=self.channels, width=self.width, layers=self.layers,
            heads=self.heads, pool="mean",
        )  # fmt: skip


class SeenPictures(NamedTuple):
    """Frames that are looked at, in the order of their rows and places.

    Attributes:
        pixels_PCHW: as the source gives them.
        numbers_P: int64, of each frame in its video; 0 begins one.
    """

    pixels_PCHW: Tensor
    numbers_P: Tensor


def bundles(numbers_P: Tensor, most: int) -> list[range]:
    """Which frames share tokens: `most` of a video, and what is left at its end.

    Args:
        numbers_P: see `SeenPictures`.
        most: frames of a bundle.
    """
    found: list[range] = []
    for at, number in enumerate(numbers_P.tolist()):
        if number % most == 0:
            found.append(range(at, at + 1))
        else:
            found[-1] = range(found[-1].start, at + 1)
    return found


class SeenPart(nn.Module):
    """See the module."""

    def __init__(self, settings: SeenPartSettings, decoder: DecoderSettings) -> None:
        super().__init__()
        self.own, self.cell = settings, settings.patch * settings.side
        vit = settings.vit()
        self.vit = VisionTransformer(vit)
        del self.vit.head  # of classes
        c, f, p = settings.channels, settings.filters, settings.patch
        self.cnn = nn.Sequential(
            nn.Conv2d(c, f, 3, padding=1), nn.GELU(), nn.Conv2d(f, f, 3, padding=1), nn.GELU(),
            nn.Conv2d(f, f, p, stride=p), nn.GELU(),
        )  # fmt: skip
        self.widen = nn.Linear(f, settings.width)
        self.place = nn.Parameter(torch.zeros(2, settings.frames, settings.side**2, settings.width))
        self.block = Block(vit)
        self.leave = Linear(settings.width, decoder.hidden_size, bias=True)

    def fill(self, seed: int) -> None:
        """Initial weights, functions of the seed: of convolutions as in a residual network, of the rest as in a ViT."""
        fill_transformer(self, seed)
        fill_convolutional(self.cnn, seed)

    def patch_features(self, pixels_PCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(P, V, H / patch, W / patch) twice: of the vision transformer, and of the convolutional network."""
        grid = tuple(side // self.own.patch for side in pixels_PCHW.shape[2:])
        vit_PVhw = self.vit.features(pixels_PCHW).transpose(1, 2).unflatten(2, grid)
        cnn_PVhw = self.widen(self.cnn(pixels_PCHW).movedim(1, -1)).movedim(-1, 1)
        return vit_PVhw, cnn_PVhw

    def embedded(self, seen: SeenPictures) -> Tensor:
        """(N, D): tokens of all frames, bundle by bundle, each row by row.

        Raises:
            ValueError: frames of another number of channels, or whose sides are no multiples of a token's.
        """
        pixels, width = seen.pixels_PCHW.to(self.leave.weight.dtype), self.leave.weight.shape[0]
        sides = tuple(pixels.shape[2:])
        if pixels.shape[1] != self.own.channels or any(side % self.cell for side in sides):
            raise ValueError(
                f"pictures of {pixels.shape[1]} channels and {sides[0]} x {sides[1]} pixels: model.seen takes "
                f"{self.own.channels} channels and sides of multiples of {self.cell} pixels (patch * side)"
            )
        found = bundles(seen.numbers_P, self.own.frames)
        tokens = sides[0] // self.cell * (sides[1] // self.cell)
        out_BnD: Tensor = pixels.new_empty(len(found), tokens, width)
        if not found:
            return out_BnD.flatten(0, 1)
        by_place = [self._by_token(one) for one in self.patch_features(pixels)]
        parts = []
        for count in sorted({len(bundle) for bundle in found}):  # pictures, whole bundles, ends of videos
            mine = [number for number, bundle in enumerate(found) if len(bundle) == count]
            index_BF = torch.tensor([list(found[number]) for number in mine], device=pixels.device)
            both = [one[index_BF] + self.place[which, :count, None] for which, one in enumerate(by_place)]
            x_BNKV = torch.cat([one.permute(0, 2, 1, 3, 4).flatten(2, 3) for one in both], 2)
            mixed_BnV = self.block(x_BNKV.flatten(0, 1), None).mean(1).view(len(mine), tokens, -1)
            parts.append((torch.tensor(mine, device=pixels.device), self.leave(mixed_BnV)))
        for mine_B, tokens_BnD in parts:
            out_BnD = out_BnD.index_copy(0, mine_B, tokens_BnD)
        return out_BnD.flatten(0, 1)

    def _by_token(self, x_PVhw: Tensor) -> Tensor:
        """(P, n, k, V): the patches of each token."""
        side = self.own.side
        cells: Tensor = x_PVhw.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        return cells.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)  # from (P, V, h, side, w, side)
