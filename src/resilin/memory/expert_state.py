"""One expert's state as bytes: its matrices, their moments, and what has happened to it.

Shapes: D hidden size, F expert size, P parameters of one expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_COUNTERS = 4  # updates, the last step that updated it, the log of all decays until then, and one to spare


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

    @property
    def record_bytes(self) -> int:
        """Weights and two moments in float32, and the counters in float64."""
        return 12 * self.parameters + 8 * _COUNTERS

    def matrix(self, name: str, flat_P: Tensor) -> Tensor:
        """One matrix of (P,) flat weights or gradients, as a view: gate and up (F, D), down (D, F)."""
        size, place = self.hidden * self.wide, self.names.index(name)
        shape = (self.hidden, self.wide) if name == "down" else (self.wide, self.hidden)
        return flat_P[place * size : (place + 1) * size].view(shape)


class ExpertState(NamedTuple):
    """Views of a record.

    Attributes:
        weights_P: float32.
        exp_avg_P: float32.
        exp_avg_sq_P: float32.
        counters: float64: updates, the last step that updated it, the log of all decays until then.
    """

    weights_P: Tensor
    exp_avg_P: Tensor
    exp_avg_sq_P: Tensor
    counters: Tensor

    @classmethod
    def of(cls, record: Tensor, shape: ExpertShape) -> ExpertState:
        """The views of a record, uint8 of `record_bytes`."""
        count = shape.parameters
        numbers = record[: 12 * count].view(torch.float32)
        weights_P, exp_avg_P, exp_avg_sq_P = numbers.split(count)
        return cls(weights_P, exp_avg_P, exp_avg_sq_P, record[12 * count :].view(torch.float64))


@dataclass(frozen=True, slots=True)
class LazyAdamW:
    """AdamW that leaves an expert alone in a step in which no token visited it, as torch does where `grad is None`.

    Attributes:
        betas: of both moving averages.
        eps: added to the root of the second moment.
        weight_decay: coupled to the learning rate, as in torch.
        catch_up: before an update, first let the moments and the weights decay as often as the expert was left alone:
            by powers of the betas and by the decays of those steps. What is left out is the movement along the old
            moments in those steps.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    catch_up: bool = False

    def log_decay(self, lr: float) -> float:
        """The log of what a step's decay multiplies weights by."""
        return math.log1p(-lr * self.weight_decay)

    def update(self, state: ExpertState, grad_P: Tensor, step: int, lr: float, log_decay: float) -> None:
        """One step, in place.

        Args:
            state: of an expert.
            grad_P: its gradient.
            step: the number of this step, from 0.
            lr: learning rate.
            log_decay: the log of all decays before this step.
        """
        updates, last = int(state.counters[0]), int(state.counters[1])
        skipped = step - 1 - (last if updates else -1)
        if self.catch_up and skipped > 0:
            state.exp_avg_P.mul_(self.betas[0] ** skipped)
            state.exp_avg_sq_P.mul_(self.betas[1] ** skipped)
            state.weights_P.mul_(math.exp(log_decay - float(state.counters[2])))
            updates += skipped
        adamw(
            [state.weights_P],
            [grad_P],
            [state.exp_avg_P],
            [state.exp_avg_sq_P],
            [],
            [torch.tensor(float(updates))],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=self.weight_decay,
            eps=self.eps,
            maximize=False,
        )
        state.counters[0], state.counters[1] = updates + 1, step
        state.counters[2] = log_decay + self.log_decay(lr)
