"""What a looped decoder's blocks are told of a loop, and what they do with it (LoopFormer, 2026, section 3).

    c = phi_t(t) + phi_d(d)                                 of a loop that begins at time t and has a step of size d
    g_a, g_m, s_a, s_m = Linear(silu(c))                    in each block
    h = h + g_a * attention((1 + s_a) * norm(h)); h = h + g_m * mlp((1 + s_m) * norm(h))

All tokens of a batch are in the same loop at the same time, so c is one vector.

Shapes: M loops, D hidden size, F frequencies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.models.cut import BlockCut
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.linear import Linear, product


def sinusoids(values_M: Tensor, count: int) -> Tensor:
    """(M,) -> (M, count) float64: cosines, then sines, of each value times exp(-ln(10000) j / half), j < half."""
    half = count // 2
    speeds = torch.exp(torch.arange(half, dtype=torch.float64, device=values_M.device) * (-math.log(10000.0) / half))
    angles = values_M.double()[:, None] * speeds
    return torch.cat([angles.cos(), angles.sin()], -1)


class NumberEmbedding(nn.Module):
    """phi: Linear - silu - Linear of a number's sinusoids, with biases."""

    def __init__(self, frequencies: int, width: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.up = Linear(frequencies, width, device=device)
        self.down = Linear(width, width, device=device)

    def forward(self, values_M: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """(M,) -> (M, width): with the leading part of its weights where the stream is narrower than they are."""
        x = sinusoids(values_M, self.up.in_features).to(dtype)
        for layer, hidden in ((self.up, False), (self.down, True)):
            weight = layer.weight[:width, :width] if hidden else layer.weight[:width]
            x = product(x, weight, layer.bias[:width])
            x = x if hidden else F.silu(x)
        return x


class LoopCondition(nn.Module):
    """What blocks are told of each loop of a trajectory."""

    def __init__(self, settings: DecoderSettings, device: torch.device | str | None = None) -> None:
        super().__init__()
        assert settings.loop is not None
        self.scale = settings.loop.time_scale
        self.time = NumberEmbedding(settings.loop.frequencies, settings.hidden_size, device)
        self.step: NumberEmbedding | None = None
        if settings.loop.condition == "time_and_step":
            self.step = NumberEmbedding(settings.loop.frequencies, settings.hidden_size, device)

    def forward(self, trajectory: tuple[int, ...], width: int, dtype: torch.dtype) -> Tensor:
        """(M, width) of the M loops of a trajectory.

        Args:
            trajectory: steps in any proportion; of condition "index" only how many there are counts.
            width: of the stream.
            dtype: of the stream.
        """
        device, whole = self.time.up.weight.device, sum(trajectory)
        if self.step is None:
            return self._embedded(self.time, [float(number) for number in range(len(trajectory))], width, dtype, device)
        times = [sum(trajectory[:loop]) / whole for loop in range(len(trajectory))]
        told = self._embedded(self.time, times, width, dtype, device)
        return told + self._embedded(self.step, [step / whole for step in trajectory], width, dtype, device)

    def _embedded(
        self, phi: NumberEmbedding, values: list[float], width: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        embedded: Tensor = phi(torch.tensor(values, dtype=torch.float64, device=device) * self.scale, width, dtype)
        return embedded.to(dtype)


class Modulated(NamedTuple):
    """What a block is to do with its branches in a loop, each (D,): factors of their outputs and of their norms."""

    attention_gate: Tensor
    mlp_gate: Tensor
    attention_scale: Tensor
    mlp_scale: Tensor


def modulated(linear: nn.Module, told_D: Tensor, cut: BlockCut | None = None) -> Modulated:
    """What a block makes of what it is told, in its format.

    Args:
        linear: the block's own map, `modulation`, (D,) -> (4 * D,).
        told_D: of this loop, as wide as the stream.
        cut: what of the block is computed.
    """
    x_D = F.silu(told_D)
    rows = linear(x_D) if cut is None else cut.linear(x_D, linear, "modulation")  # type: ignore[arg-type]
    attention_gate, mlp_gate, attention_scale, mlp_scale = rows.to(told_D.dtype).view(4, -1)
    return Modulated(attention_gate, mlp_gate, 1 + attention_scale, 1 + mlp_scale)
