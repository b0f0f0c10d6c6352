"""Residual networks for series, images and video (He et al., "Deep residual learning", CVPR 2016).

Legend: B samples, C channels; the axes after them are (T), (H, W) or (T, H, W).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.keys import Keys, dropout
from resilin.models.settings import ModelContext, ModelSettings
from resilin.vision.initial import fill_convolutional
from resilin.vision.layers import BLOCKS, Stem, check_stages, global_mean, stage

Positive = Annotated[int, Field(ge=1)]


class ResNet(ModelSettings):
    """A residual network; (2, 2, 2, 2) basic blocks of width 64 are ResNet-18, (3, 4, 6, 3) bottlenecks ResNet-50.

    With `dims = 3` it is the Slow pathway of SlowFast by itself (Feichtenhofer et al., 2019): convolutions over time
    in the stages whose `time_kernels` is above 1, and no stride in time, so any number of frames will do.
    """

    classes: Positive
    """Outputs."""
    dims: Literal[1, 2, 3] = 2
    """1: series (T); 2: images (H, W); 3: video (T, H, W)."""
    channels: Positive = 3
    """Of the input."""
    block: Literal["basic", "bottleneck"] = "basic"
    stages: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of each stage; every stage but the first halves each axis of space and doubles the width."""
    width: Positive = 64
    """Of the first stage."""
    stem: Literal["large", "small"] = "large"
    """large: 7 wide, stride 2, then pooling; small (32 pixels or so): 3 wide, stride 1."""
    time_kernels: tuple[int, ...] = ()
    """Video: the kernel over time in each stage's blocks; left out: 1 in the first half of the stages, 3 after."""
    stem_time_kernel: Positive = 1
    """Video: the kernel over time of the stem."""
    zero_last: bool = True
    """The last norm of each block begins with a scale of 0 (Goyal et al., 2017)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Before the head."""

    @model_validator(mode="after")
    def _stages_fit(self) -> ResNet:
        check_stages(self.stages, "stages")
        if self.time_kernels and len(self.time_kernels) != len(self.stages):
            raise ValueError(f"time_kernels has {len(self.time_kernels)} values for {len(self.stages)} stages")
        odd = (*self.time_kernels, self.stem_time_kernel)
        if any(kernel < 1 or kernel % 2 == 0 for kernel in odd):
            raise ValueError(f"kernels over time {list(odd)} should be odd numbers: an even one shifts the frames")
        return self

    def kernels(self) -> tuple[int, ...]:
        """The kernel over time of each stage."""
        if self.time_kernels or self.dims != 3:
            return self.time_kernels or (1,) * len(self.stages)
        return tuple(1 if index < len(self.stages) // 2 else 3 for index in range(len(self.stages)))

    def build(self, context: ModelContext) -> Residual:
        """The network, with its initial weights."""
        model = Residual(self)
        fill_convolutional(model, context.seed, zero_last="last.norm.weight" if self.zero_last else "")
        return model


class Residual(nn.Module):
    """See `ResNet`; the head averages over every axis, so inputs of any size will do."""

    def __init__(self, settings: ResNet) -> None:
        super().__init__()
        self.settings = settings
        small = settings.stem == "small"
        self.stem = Stem(
            settings.channels, settings.width, settings.dims, small=small, time_kernel=settings.stem_time_kernel
        )
        stages, inputs, expansion = [], settings.width, BLOCKS[settings.block].expansion
        for index, (count, kernel) in enumerate(zip(settings.stages, settings.kernels(), strict=True)):
            width = settings.width * 2**index
            stages.append(stage(settings.block, inputs, width, count, settings.dims, 1 if index == 0 else 2, kernel))
            inputs = width * expansion
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, settings.classes)

    def forward(self, inputs: Tensor, *, keys: Keys | None = None) -> Tensor:
        """(B, C, ...) -> logits (B, classes); `keys`: for dropout, None for none."""
        check_axes(inputs, self.settings.channels, self.settings.dims)
        x_BC = global_mean(self.stages(self.stem(inputs)))
        logits: Tensor = self.head(dropout(x_BC, self.settings.dropout, keys.fold("head") if keys else None))
        return logits


def check_axes(inputs: Tensor, channels: int, dims: int) -> None:
    """Refuse inputs of another kind than the model's.

    Raises:
        ValueError: with both shapes.
    """
    if inputs.ndim != dims + 2 or inputs.shape[1] != channels:
        axes = {1: "T", 2: "H, W", 3: "T, H, W"}[dims]
        raise ValueError(
            f"the model takes inputs (B, {channels}, {axes}), the batch has {tuple(inputs.shape)}: set model.dims and "
            "model.channels to what the source gives"
        )
