"""Rotary positions (Su et al., RoFormer, 2021): pair i of a head is turned by position * speed_i.

Pairs are (x_i, x_{i + D/2}), the layout of Hugging Face weights.
Shapes: B batch, T tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.function import PlainFunction
from resilin.models.rope_scaling import DynamicScaling, LongRopeScaling, base_frequencies


class Rotation(NamedTuple):
    """Cosines and sines of the angles of some positions, ready to broadcast over heads.

    Attributes:
        cos: (T, 1, D) or (B, T, 1, D) float32: the cosines of the D/2 pairs, twice.
        sin: the same shape: minus the sines, then the sines.
    """

    cos: Tensor
    sin: Tensor


def axes_of_pairs(pairs: int) -> Tensor:
    """(pairs,) int64: which coordinate (time 0, height 1, width 2) turns each pair of a head.

    They take turns, from the fastest pair on, so that each has fast and slow pairs alike.
    """
    return torch.arange(pairs) % 3


def rotation(settings: DecoderSettings, positions: Tensor, length: int) -> Rotation:
    """The rotation of some positions.

    Args:
        settings: of the decoder.
        positions: (T) or (B, T) integers; or (B, T, 3) numbers, whole or not: time, height and width, between which
            the pairs of a head are divided (`axes_of_pairs`). Where the three are equal, the rotation is that of the
            one number.
        length: one more than the largest position so far; only `dynamic` and `longrope` scaling look at it.
    """
    scaling, magnitude = settings.rope_scaling, 1.0
    if scaling is None:
        speeds = base_frequencies(settings.head_width, settings.rope_theta, positions.device)
    else:
        speeds, magnitude = scaling.frequencies(
            settings.head_width, settings.rope_theta, settings.max_positions, length, positions.device
        )
    at_pairs = positions[..., None]
    if positions.ndim == 3:
        at_pairs = positions[..., axes_of_pairs(len(speeds)).to(positions.device)]
    angles = (at_pairs.to(torch.float32) * speeds)[..., None, :]
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def depends_on_length(settings: DecoderSettings) -> bool:
    """Whether the speeds of rotation change with the length of the text."""
    return isinstance(settings.rope_scaling, DynamicScaling | LongRopeScaling)


def _swap_halves(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], x[..., :half]), dim=-1)


class _Rotate(PlainFunction):
    """A rotation's gradient is the rotation back, so nothing of the activations is kept.

    One product and one fused multiply-add over whole heads: on the CPU twice as fast as working on half heads.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
        return (x * cos).addcmul_(_swap_halves(x), sin, value=direction)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, cos, sin, ctx.direction = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, sin, -ctx.direction), None, None, None


def rotate(x_BTHD: Tensor, turn: Rotation) -> Tensor:
    """Queries or keys (B, T, H, D) turned to their positions, in their own dtype."""
    cos, sin = turn.cos.to(x_BTHD.dtype), turn.sin.to(x_BTHD.dtype)
    if not torch.is_grad_enabled():  # recording costs 90 us a call
        return _Rotate.forward(x_BTHD, cos, sin, 1.0)
    rotated: Tensor = _Rotate.apply(x_BTHD, cos, sin, 1.0)
    return rotated
