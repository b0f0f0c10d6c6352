"""One expert's state as bytes: its matrices, what its optimizer keeps of them, and how many updates it has had.

Shapes: D hidden size, F expert size, P parameters of one expert, M matrices of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Attributes:
    hidden: D.
    wide: F.
    gated: whether there is a gate.
    """

    hidden: int
    wide: int
    gated: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Of the matrices, in order."""
        return ("gate", "up", "down") if self.gated else ("up", "down")

    @property
    def parameters(self) -> int:
        """P."""
        return len(self.names) * self.hidden * self.wide

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """Gate and up (F, D), down (D, F)."""
        return (self.hidden, self.wide) if name == "down" else (self.wide, self.hidden)

    def matrix(self, name: str, flat_P: Tensor) -> Tensor:
        """One matrix of (P,) flat weights or gradients, as a view."""
        size, place = self.hidden * self.wide, self.names.index(name)
        return flat_P[place * size : (place + 1) * size].view(self.matrix_shape(name))


@dataclass(frozen=True, slots=True)
class Record:
    """How a state lies in memory: weights, then moments in float32, and a count in int64.

    Attributes:
        shape: of the expert.
        wide: names of moments that have a matrix's shape.
        single: names of moments that are one number for each matrix.
    """

    shape: ExpertShape
    wide: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    single: tuple[str, ...] = ("step",)

    @property
    def parameters(self) -> int:
        """P."""
        return self.shape.parameters

    @property
    def numbers(self) -> int:
        """In float32."""
        return (1 + len(self.wide)) * self.parameters + len(self.single) * len(self.shape.names)

    @property
    def record_bytes(self) -> int:
        """Of one expert."""
        return -(-4 * self.numbers // 8) * 8 + 8

    def of(self, record: Tensor) -> ExpertState:
        """The views of a record, uint8 of `record_bytes`."""
        numbers, count = record[: 4 * self.numbers].view(torch.float32), self.parameters
        weights_P, *moments = numbers[: (1 + len(self.wide)) * count].split(count)
        singles = numbers[(1 + len(self.wide)) * count :].view(len(self.single), len(self.shape.names))
        updates = record[self.record_bytes - 8 :].view(torch.int64).view(())
        wide = dict(zip(self.wide, moments, strict=True))
        return ExpertState(weights_P, wide, dict(zip(self.single, singles, strict=True)), updates)


class ExpertState(NamedTuple):
    """Views of a record.

    Attributes:
        weights_P: float32.
        wide: moments of a matrix's shape, (P,) float32 each.
        single: moments of one number, (M,) float32 each.
        updates: 0-d int64, how many of its layer's updates it has had.
    """

    weights_P: Tensor
    wide: Mapping[str, Tensor]
    single: Mapping[str, Tensor]
    updates: Tensor

    def moments(self, shape: ExpertShape, name: str) -> dict[str, Tensor]:
        """Of one matrix: of its shape, or 0-d."""
        place = shape.names.index(name)
        return {kind: shape.matrix(name, flat_P) for kind, flat_P in self.wide.items()} | {
            kind: numbers_M[place] for kind, numbers_M in self.single.items()
        }
