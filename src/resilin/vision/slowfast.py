"""SlowFast networks: two pathways over one clip at two frame rates (Feichtenhofer et al., ICCV 2019).

Legend: B samples, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.keys import Keys, dropout
from resilin.models.settings import ModelContext, ModelSettings
from resilin.vision.initial import fill_convolutional
from resilin.vision.layers import BLOCKS, ConvNorm, Stem, check_stages, global_mean, stage
from resilin.vision.resnet import check_axes

Positive = Annotated[int, Field(ge=1)]


class SlowFast(ModelSettings):
    """A Slow pathway that sees every `alpha`-th frame and a thin Fast one that sees all, joined by lateral connections.

    SlowFast R50, 4x16 or 8x8: block bottleneck, stages (3, 4, 6, 3), width 64, alpha 8 or 4, beta_inverse 8, clips of
    32 frames at stride 2. A clip with fewer than `alpha` frames gives the Slow pathway one.
    """

    classes: Positive
    """Outputs."""
    channels: Positive = 3
    """Of the input."""
    block: Literal["basic", "bottleneck"] = "bottleneck"
    stages: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks of each stage."""
    width: Positive = 64
    """Of the Slow pathway's first stage."""
    alpha: Positive = 4
    """Frames of the Fast pathway for one of the Slow."""
    beta_inverse: Positive = 8
    """The Fast pathway is this many times thinner."""
    fusion_kernel: Positive = 7
    """Frames that a lateral connection sees, an odd number (section 3.4, time-strided convolution)."""
    fusion_ratio: Positive = 2
    """Channels of a lateral connection, in those of the Fast pathway."""
    stem: Literal["large", "small"] = "large"
    """As `resilin.vision.resnet:ResNet` has it."""
    zero_last: bool = True
    """The last norm of each block begins with a scale of 0."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Before the head."""

    @model_validator(mode="after")
    def _fits(self) -> SlowFast:
        check_stages(self.stages, "stages")
        if self.fusion_kernel % 2 == 0:
            raise ValueError(f"fusion_kernel ({self.fusion_kernel}) should be odd: an even one shifts the frames")
        if self.width % self.beta_inverse:
            raise ValueError(
                f"width ({self.width}) is not divisible by beta_inverse ({self.beta_inverse}): their ratio is the "
                "Fast pathway's width"
            )
        return self

    def build(self, context: ModelContext) -> TwoPathways:
        """The network, with its initial weights."""
        model = TwoPathways(self)
        fill_convolutional(model, context.seed, zero_last="last.norm.weight" if self.zero_last else "")
        return model


class TwoPathways(nn.Module):
    """See `SlowFast`; the head averages over every axis, so clips of any size will do."""

    def __init__(self, settings: SlowFast) -> None:
        super().__init__()
        self.settings = settings
        small, expansion = settings.stem == "small", BLOCKS[settings.block].expansion
        slow, fast = settings.width, settings.width // settings.beta_inverse
        self.slow_stem = Stem(settings.channels, slow, 3, small=small, time_kernel=1)
        self.fast_stem = Stem(settings.channels, fast, 3, small=small, time_kernel=5)
        kernel, stride = (settings.fusion_kernel, 1, 1), (settings.alpha, 1, 1)
        laterals, slow_stages, fast_stages = [], [], []
        slow_in, fast_in, count = slow, fast, len(settings.stages)
        for index, blocks in enumerate(settings.stages):
            laterals.append(ConvNorm(fast_in, fast_in * settings.fusion_ratio, kernel, stride))
            step, wide = 1 if index == 0 else 2, 2**index
            time = 1 if index < count // 2 else 3
            with_lateral = slow_in + fast_in * settings.fusion_ratio
            slow_stages.append(stage(settings.block, with_lateral, slow * wide, blocks, 3, step, time))
            fast_stages.append(stage(settings.block, fast_in, fast * wide, blocks, 3, step, 3))
            slow_in, fast_in = slow * wide * expansion, fast * wide * expansion
        self.laterals, self.slow_stages = nn.ModuleList(laterals), nn.ModuleList(slow_stages)
        self.fast_stages = nn.ModuleList(fast_stages)
        self.head = nn.Linear(slow_in + fast_in, settings.classes)

    def forward(self, inputs: Tensor, *, keys: Keys | None = None) -> Tensor:
        """(B, C, T, H, W) -> logits (B, classes); `keys`: for dropout, None for none."""
        check_axes(inputs, self.settings.channels, 3)
        fast = self.fast_stem(inputs)
        # A convolution with stride alpha, padded by half its kernel, ends on the same frames: 0, alpha, 2 alpha, ...
        slow = self.slow_stem(inputs[:, :, :: self.settings.alpha])
        for lateral, slow_stage, fast_stage in zip(self.laterals, self.slow_stages, self.fast_stages, strict=True):
            slow = slow_stage(torch.cat((slow, lateral(fast)), 1))
            fast = fast_stage(fast)
        x_BC = torch.cat((global_mean(slow), global_mean(fast)), 1)
        logits: Tensor = self.head(dropout(x_BC, self.settings.dropout, keys.fold("head") if keys else None))
        return logits
