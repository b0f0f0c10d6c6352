"""The gradient of one step: micro-batches in, one canonical sum out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from resilin.keys import Keys
from resilin.nouns import Batch, Log, Loss, Objective
from resilin.optim.clip import clip_factor, global_norm
from resilin.parallel.canonical import GradientSum, tree_sum

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class StepGradient:
    """The summed gradient of a step, already in `.grad` and divided by the units.

    Attributes:
        loss: mean loss over the valid units.
        units: number of valid units.
        norm: global gradient norm before clipping.
        logs: merged logs of all micro-batches.
    """

    loss: float
    units: float
    norm: float
    logs: dict[str, float]

    @property
    def finite(self) -> bool:
        """Whether the step may be committed."""
        limit = float("inf")
        return abs(self.loss) < limit and self.norm < limit


def merge_logs(losses: list[Loss]) -> dict[str, float]:
    """The logs of several micro-batches as numbers."""
    merged: dict[str, Log] = {}
    for loss in losses:
        for name, log in loss.logs.items():
            merged[name] = merged[name].merge(log) if name in merged else log  # type: ignore[arg-type]
    return {name: log.value() for name, log in merged.items()}


def gradient_of_step(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    keys: Keys,
    *,
    micro_batch_size: int,
    clip_norm: float,
    device: torch.device,
    autocast: Autocast,
) -> StepGradient:
    """Forward and backward over a step's batch.

    The gradient is the canonical sum over micro-batches, divided once by the number of valid units and, in the same
    multiplication, clipped to `clip_norm` (0: not clipped).
    """
    starts = range(0, len(batch), micro_batch_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = GradientSum(parameters, len(starts))
    losses: list[Loss] = []
    for start in starts:
        stop = min(start + micro_batch_size, len(batch))
        with autocast():
            loss = objective(model, batch.rows(start, stop).to(device), keys.rows(start, stop))
        loss.sum.backward()
        gradients.collect()
        losses.append(Loss(loss.sum.detach(), loss.units.detach(), loss.logs))
    grads = gradients.finish()
    units = tree_sum([loss.units.double() for loss in losses])
    total = tree_sum([loss.sum.double() for loss in losses])
    norm_of_sum = global_norm(grads)
    # One transfer from the device, one synchronisation a step.
    units_value, total_value, norm_value = torch.stack([units, total, norm_of_sum]).tolist()
    if units_value == 0:
        raise ValueError(
            "a step without a single valid unit: every label of its batch is masked; check the source's masks and "
            "lengths, or use a larger batch"
        )
    norm = norm_value / units_value
    torch._foreach_mul_(grads, clip_factor(norm, clip_norm) / units_value)
    return StepGradient(total_value / units_value, units_value, norm, merge_logs(losses))


def non_finite_slots(
    model: nn.Module, objective: Objective, batch: Batch, keys: Keys, *, device: torch.device, autocast: Autocast
) -> list[int]:
    """The slots whose own loss or gradient is not finite, found by computing each alone; gradients are dropped."""
    found = []
    for row in range(len(batch)):
        with autocast():
            loss = objective(model, batch.rows(row, row + 1).to(device), keys.rows(row, row + 1))
        model.zero_grad(set_to_none=True)
        if loss.sum.requires_grad:
            loss.sum.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        finite = bool(torch.isfinite(loss.sum)) and all(bool(torch.isfinite(g).all()) for g in grads)
        if not finite:
            found.append(int(batch.slots_B[row]))
    model.zero_grad(set_to_none=True)
    return found
