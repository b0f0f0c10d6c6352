"""Ways of stretching rotary positions over longer texts than a model was trained on.

Each is a small settings class whose `frequencies` gives the rotation speeds of the D/2 pairs of a head (radians per
position) and the factor by which rotated queries and keys are scaled.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from resilin.config import Settings

PositiveInt = Annotated[int, Field(gt=0)]
Factor = Annotated[float, Field(ge=1.0)]


def base_frequencies(head_size: int, theta: float, device: torch.device | None = None) -> Tensor:
    """(D/2,) float32: `theta ** (-2i / D)` (Su et al., RoFormer, 2021, equation 15)."""
    exponents = torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size
    return 1.0 / (theta**exponents)


class LinearScaling(Settings):
    """Position interpolation: all speeds divided by one factor (Chen et al., 2023)."""

    kind: Literal["linear"] = "linear"
    factor: Factor
    """How many times longer texts become."""

    def frequencies(
        self, head_size: int, theta: float, max_positions: int, length: int, device: torch.device | None
    ) -> tuple[Tensor, float]:
        """Speeds (D/2,) and the scale of rotated vectors."""
        return base_frequencies(head_size, theta, device) / self.factor, 1.0


class DynamicScaling(Settings):
    """Dynamic NTK: the base grows with the length of the text once it exceeds `max_positions`."""

    kind: Literal["dynamic"] = "dynamic"
    factor: Factor
    """How strongly the base grows."""

    def frequencies(
        self, head_size: int, theta: float, max_positions: int, length: int, device: torch.device | None
    ) -> tuple[Tensor, float]:
        """Speeds (D/2,) and the scale of rotated vectors."""
        stretch = self.factor * max(length, max_positions) / max_positions - (self.factor - 1.0)
        return base_frequencies(head_size, theta * stretch ** (head_size / (head_size - 2)), device), 1.0


class Llama3Scaling(Settings):
    """Llama 3.1: slow speeds divided by a factor, fast ones kept, a linear passage between."""

    kind: Literal["llama3"] = "llama3"
    factor: Factor
    """How many times longer texts become."""
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    """Speeds with fewer turns than this over the original length are divided by `factor`."""
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    """Speeds with more turns than this over the original length are kept."""
    original_max_positions: PositiveInt = 8192
    """The length trained on before stretching."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor}) should be larger than "
                f"low_freq_factor ({self.low_freq_factor})"
            )
        return self

    def frequencies(
        self, head_size: int, theta: float, max_positions: int, length: int, device: torch.device | None
    ) -> tuple[Tensor, float]:
        """Speeds (D/2,) and the scale of rotated vectors."""
        speed = base_frequencies(head_size, theta, device)
        turns = self.original_max_positions * speed / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return (1 - kept) * speed / self.factor + kept * speed, 1.0


class YarnScaling(Settings):
    """YaRN (Peng et al., 2023, section 3): interpolation by parts and a temperature on the attention logits."""

    kind: Literal["yarn"] = "yarn"
    factor: Factor
    """How many times longer texts become."""
    original_max_positions: PositiveInt
    """The length trained on before stretching."""
    beta_fast: float = 32.0
    """Pairs that turn more often than this over the original length keep their speed."""
    beta_slow: float = 1.0
    """Pairs that turn less often than this are divided by `factor`."""
    attention_factor: float | None = None
    """Scale of rotated vectors; None: `0.1 ln(factor) + 1`, or the ratio of the two mscales."""
    mscale: float | None = None
    """Numerator of DeepSeek's ratio of scales."""
    mscale_all_dim: float | None = None
    """Denominator of DeepSeek's ratio of scales."""
    truncate: bool = True
    """Whether the borders of the passage are rounded to whole pairs."""

    def _pair_of_turns(self, turns: float, head_size: int, theta: float) -> float:
        ratio = self.original_max_positions / (turns * 2 * math.pi)
        return head_size * math.log(ratio) / (2 * math.log(theta))

    def _magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)

    def frequencies(
        self, head_size: int, theta: float, max_positions: int, length: int, device: torch.device | None
    ) -> tuple[Tensor, float]:
        """Speeds (D/2,) and the scale of rotated vectors."""
        low = self._pair_of_turns(self.beta_fast, head_size, theta)
        high = self._pair_of_turns(self.beta_slow, head_size, theta)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_size - 1)
        width = high - low if high != low else 0.001
        pair = torch.arange(head_size // 2, device=device, dtype=torch.float32)
        slowed = ((pair - low) / width).clamp(0.0, 1.0)
        speed = base_frequencies(head_size, theta, device)
        return speed / self.factor * slowed + speed * (1 - slowed), self._magnitude()


class LongRopeScaling(Settings):
    """LongRoPE (Ding et al., 2024): a divisor for every pair, one list for short and one for long texts."""

    kind: Literal["longrope"] = "longrope"
    short_factor: tuple[float, ...]
    """Divisors (head_size / 2 of them) up to the original length."""
    long_factor: tuple[float, ...]
    """Divisors beyond it."""
    original_max_positions: PositiveInt
    """The length trained on before stretching."""
    factor: float | None = None
    """How many times longer texts become; None: max_positions / original_max_positions."""
    attention_factor: float | None = None
    """Scale of rotated vectors; None: `sqrt(1 + ln(factor) / ln(original_max_positions))`."""

    def frequencies(
        self, head_size: int, theta: float, max_positions: int, length: int, device: torch.device | None
    ) -> tuple[Tensor, float]:
        """Speeds (D/2,) and the scale of rotated vectors."""
        divisors = self.long_factor if length > self.original_max_positions else self.short_factor
        factor = self.factor or max_positions / self.original_max_positions
        magnitude = self.attention_factor
        if magnitude is None:
            magnitude = 1.0
            if factor > 1.0:
                magnitude = math.sqrt(1 + math.log(factor) / math.log(self.original_max_positions))
        speed = base_frequencies(head_size, theta, device)
        return speed / torch.tensor(divisors, device=device, dtype=torch.float32), magnitude


RopeScaling = Annotated[
    LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling, Field(discriminator="kind")
]
"""Any of them, told apart by `kind`."""
