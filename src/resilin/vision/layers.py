"""Convolutions, norms and pooling over one, two or three axes, and the residual blocks made of them.

Legend: B samples, C channels; the axes after them are (T), (H, W) or (T, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}

Axes = tuple[int, ...]


def convolution(inputs: int, outputs: int, kernel: Axes, stride: Axes) -> nn.Module:
    """A convolution without bias that keeps each axis' size but for the stride (odd kernels)."""
    padding = tuple(k // 2 for k in kernel)
    return CONVOLUTIONS[len(kernel)](inputs, outputs, kernel, stride=stride, padding=padding, bias=False)


def axes_of(dims: int, space: int, time: int = 1) -> Axes:
    """A kernel or stride: `space` for each axis of space, `time` for that of time before them where `dims` is 3."""
    return (time, space, space) if dims == 3 else (space,) * dims


class ConvNorm(nn.Module):
    """Convolution, batch norm and, if wanted, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Axes, stride: Axes, *, relu: bool = True) -> None:
        super().__init__()
        self.conv = convolution(inputs, outputs, kernel, stride)
        self.norm = NORMS[len(kernel)](outputs)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, outputs, ...)."""
        found: Tensor = self.relu(self.norm(self.conv(x)))
        return found


class Basic(nn.Module):
    """Two 3-wide convolutions and a shortcut (He et al., 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, dims: int, stride: int, time_kernel: int) -> None:
        super().__init__()
        one = axes_of(dims, 1)
        self.first = ConvNorm(inputs, width, axes_of(dims, 3, time_kernel), axes_of(dims, stride))
        self.last = ConvNorm(width, width, axes_of(dims, 3), one, relu=False)
        self.shortcut = shortcut(inputs, width, dims, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, ...) -> (B, width, ...)."""
        found: Tensor = self.relu(self.last(self.first(x)) + self.shortcut(x))
        return found


class Bottleneck(nn.Module):
    """1, 3 and 1 wide convolutions and a shortcut (He et al., 2016, figure 5 right); the stride is in the middle."""

    expansion = 4

    def __init__(self, inputs: int, width: int, dims: int, stride: int, time_kernel: int) -> None:
        super().__init__()
        one, outputs = axes_of(dims, 1), width * self.expansion
        self.first = ConvNorm(inputs, width, axes_of(dims, 1, time_kernel), one)
        self.middle = ConvNorm(width, width, axes_of(dims, 3), axes_of(dims, stride))
        self.last = ConvNorm(width, outputs, one, one, relu=False)
        self.shortcut = shortcut(inputs, outputs, dims, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, ...) -> (B, 4 width, ...)."""
        found: Tensor = self.relu(self.last(self.middle(self.first(x))) + self.shortcut(x))
        return found


BLOCKS: dict[str, type[Basic] | type[Bottleneck]] = {"basic": Basic, "bottleneck": Bottleneck}


def shortcut(inputs: int, outputs: int, dims: int, stride: int) -> nn.Module:
    """The identity where it fits, else a convolution of width 1 and a norm."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return ConvNorm(inputs, outputs, axes_of(dims, 1), axes_of(dims, stride), relu=False)


def stage(block: str, inputs: int, width: int, count: int, dims: int, stride: int, time_kernel: int) -> nn.Sequential:
    """Blocks of one width; only the first has the stride. Time is never strided."""
    make = BLOCKS[block]
    blocks: list[nn.Module] = []
    for index in range(count):
        blocks.append(make(inputs, width, dims, stride if index == 0 else 1, time_kernel))
        inputs = width * make.expansion
    return nn.Sequential(*blocks)


class Stem(nn.Module):
    """The first convolution: 7 wide with stride 2 and a pooling of 3 with stride 2, or (small images) 3 wide alone."""

    def __init__(self, inputs: int, width: int, dims: int, *, small: bool, time_kernel: int) -> None:
        super().__init__()
        kernel, step = (3, 1) if small else (7, 2)
        self.conv = ConvNorm(inputs, width, axes_of(dims, kernel, time_kernel), axes_of(dims, step))
        pad = axes_of(dims, 1, 0)
        self.pool = nn.Identity() if small else POOLS[dims](axes_of(dims, 3), axes_of(dims, 2), pad)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, width, ...)."""
        found: Tensor = self.pool(self.conv(x))
        return found


def global_mean(x: Tensor) -> Tensor:
    """(B, C, ...) -> (B, C): the mean over every axis, of whatever size."""
    return x.flatten(2).mean(2)


def check_stages(counts: Sequence[int], what: str) -> None:
    """Refuse an empty list of stages or a stage without a block.

    Raises:
        ValueError: naming the setting.
    """
    if not counts or any(count < 1 for count in counts):
        raise ValueError(f"{what} {list(counts)} should be one or more numbers of blocks, each at least 1")
