"""Vision transformer (Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021).

Legend: B images, C channels, N tokens (patches, and the class token), D width, h heads.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.keys import Keys, dropout
from resilin.models.settings import ModelContext, ModelSettings
from resilin.vision.initial import fill_transformer
from resilin.vision.resnet import check_axes

Positive = Annotated[int, Field(ge=1)]


class ViT(ModelSettings):
    """A vision transformer; 12 layers of width 768 with 12 heads and patches of 16 are ViT-B/16.

    Images of another size than `size` will do where both sides are divisible by `patch`: position embeddings are
    resampled to their grid.
    """

    classes: Positive
    """Outputs."""
    size: Positive = 224
    """Height and width that the position embeddings are for."""
    patch: Positive = 16
    """Height and width of a patch."""
    channels: Positive = 3
    """Of the input."""
    width: Positive = 768
    layers: Positive = 12
    heads: Positive = 12
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Width of the feed-forward layer, in the model's."""
    pool: Literal["class_token", "mean"] = "class_token"
    """What the head sees: a token of its own, or the mean over patches."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the embeddings and of what each block adds."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6

    @model_validator(mode="after")
    def _divides(self) -> ViT:
        if self.size % self.patch:
            near = self.size // self.patch * self.patch
            raise ValueError(
                f"size ({self.size}) is not divisible by patch ({self.patch}): use {near or self.patch} or "
                f"{near + self.patch}"
            )
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) is not divisible by heads ({self.heads})")
        return self

    def build(self, context: ModelContext) -> VisionTransformer:
        """The transformer, with its initial weights."""
        model = VisionTransformer(self)
        fill_transformer(model, context.seed)
        return model


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and added to its input."""

    def __init__(self, settings: ViT) -> None:
        super().__init__()
        width, self.heads, self.dropout = settings.width, settings.heads, settings.dropout
        inner = round(width * settings.mlp_ratio)
        self.attention_norm = nn.LayerNorm(width, eps=settings.norm_eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=settings.norm_eps)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x_BND: Tensor, keys: Keys | None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        B, N, D = x_BND.shape
        qkv_3BhNd = self.qkv(self.attention_norm(x_BND)).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed_BhNd = F.scaled_dot_product_attention(*qkv_3BhNd.unbind(0))
        mixed_BND = self.out(mixed_BhNd.transpose(1, 2).reshape(B, N, D))
        x_BND = x_BND + dropout(mixed_BND, self.dropout, keys.fold("attention") if keys else None)
        hidden_BND = self.down(F.gelu(self.up(self.mlp_norm(x_BND))))
        return x_BND + dropout(hidden_BND, self.dropout, keys.fold("mlp") if keys else None)


class VisionTransformer(nn.Module):
    """See `ViT`."""

    def __init__(self, settings: ViT) -> None:
        super().__init__()
        self.settings = settings
        self.side = settings.size // settings.patch
        token = settings.pool == "class_token"
        self.patches = nn.Conv2d(settings.channels, settings.width, settings.patch, stride=settings.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, settings.width)) if token else None
        self.positions = nn.Parameter(torch.zeros(1, self.side**2 + token, settings.width))
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width, eps=settings.norm_eps)
        self.head = nn.Linear(settings.width, settings.classes)

    def positions_for(self, rows: int, columns: int) -> Tensor:
        """Position embeddings (1, N, D) of a grid of patches, resampled (bicubic) where it is not the model's own."""
        if (rows, columns) == (self.side, self.side):
            return self.positions
        token = self.class_token is not None
        own, grid = self.positions[:, :token], self.positions[:, token:]
        grid = grid.transpose(1, 2).unflatten(2, (self.side, self.side))
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True, align_corners=False)
        return torch.cat((own, grid.flatten(2).transpose(1, 2)), 1)

    def features(self, inputs: Tensor, keys: Keys | None = None) -> Tensor:
        """(B, C, H, W) -> (B, N, D): what is made of each patch, row by row, behind the class token where there is one.

        Raises:
            ValueError: for a height or width that is not divisible by the patch.
        """
        check_axes(inputs, self.settings.channels, 2)
        patch = self.settings.patch
        height, width = inputs.shape[2:]
        if height % patch or width % patch:
            raise ValueError(
                f"images of {height} x {width} are not divisible into patches of {patch}: choose such sizes"
            )
        x_BND = self.patches(inputs).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x_BND = torch.cat((self.class_token.expand(len(x_BND), -1, -1), x_BND), 1)
        x_BND = x_BND + self.positions_for(height // patch, width // patch)
        keys = keys if self.settings.dropout else None
        x_BND = dropout(x_BND, self.settings.dropout, keys.fold("embed") if keys else None)
        for index, block in enumerate(self.blocks):
            x_BND = block(x_BND, keys.fold(index) if keys else None)
        normed_BND: Tensor = self.norm(x_BND)
        return normed_BND

    def forward(self, inputs: Tensor, *, keys: Keys | None = None) -> Tensor:
        """(B, C, H, W) -> logits (B, classes); `keys`: for dropout, None for none.

        Raises:
            ValueError: for a height or width that is not divisible by the patch.
        """
        x_BND = self.features(inputs, keys)
        logits: Tensor = self.head(x_BND[:, 0] if self.class_token is not None else x_BND.mean(1))
        return logits
