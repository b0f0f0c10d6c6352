"""The gradient of one step: micro-batches in, one canonical sum out.

`Engine` is what a run needs of whoever computes its steps: `OneProcess` does it alone, `resilin.parallel.workers` as
one of many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from resilin.keys import Keys
from resilin.nouns import Batch, Loss, Objective, Source
from resilin.optim.clip import clip_factor, global_norm
from resilin.optim.rows import HasGradient, gradient_holders, gradients_of
from resilin.parallel.canonical import GradientSum, tree_sum
from resilin.parallel.report import Summed, merge_logs

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


class Engine(Protocol):
    """Who computes steps: one process, or all workers together, each calling the same methods in the same order."""

    @property
    def lead(self) -> bool:
        """Whether this process speaks for the run: logs, prints, keeps the folder."""

    def slots(self, count: int, step: int) -> Sequence[int]:
        """Which of a step's `count` slots this process has to fetch, ascending."""

    def gradient(self, batch: Batch, keys: Keys, count: int) -> StepGradient:
        """Forward and backward over a step; what is to be updated has its gradient afterwards.

        Args:
            batch: of this process's slots.
            keys: of those slots.
            count: slots of the whole step.
        """

    def non_finite(self, batch: Batch, keys: Keys) -> list[int] | None:
        """The slots of the whole step whose own loss or gradient is not finite; None: nobody could look for them."""

    def evaluate(self, source: Source, indices: Iterable[int]) -> Summed:
        """The losses of whole held-out batches, without randomness."""

    def agreed(self, value: int) -> int:
        """The largest of what all workers give."""

    def loaded(self) -> None:
        """The model's weights were filled from a checkpoint."""


class OneProcess:
    """Computes everything itself.

    Args:
        model: what the objective calls: the model, or its compiled form.
        objective: of the run.
        micro_batch_size: slots computed at once; 0: all.
        clip_norm: see `train.clip_norm`.
        device: where batches go.
        autocast: the format of the step.
    """

    lead = True

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        micro_batch_size: int,
        clip_norm: float,
        device: torch.device,
        autocast: Autocast,
    ) -> None:
        self._model, self._objective = model, objective
        self._micro, self._clip, self._device, self._autocast = micro_batch_size, clip_norm, device, autocast

    def slots(self, count: int, step: int) -> range:
        """All."""
        return range(count)

    def gradient(self, batch: Batch, keys: Keys, count: int) -> StepGradient:
        """See `gradient_of_step`."""
        return gradient_of_step(
            self._model,
            self._objective,
            batch,
            keys,
            micro_batch_size=self._micro or len(batch),
            clip_norm=self._clip,
            device=self._device,
            autocast=self._autocast,
        )

    def non_finite(self, batch: Batch, keys: Keys) -> list[int]:
        """See `non_finite_slots`."""
        return non_finite_slots(self._model, self._objective, batch, keys, device=self._device, autocast=self._autocast)

    @torch.no_grad()
    def evaluate(self, source: Source, indices: Iterable[int]) -> Summed:
        """One batch after another."""
        rows = []
        for index in indices:
            batch = source.fetch(index, range(source.slots(index)))
            with self._autocast():
                rows.append(self._objective(self._model, batch.to(self._device), None))
        units = sum(float(loss.units) for loss in rows)
        total = sum(float(loss.sum) for loss in rows)
        return Summed(total, units, merge_logs(rows), rows)

    def agreed(self, value: int) -> int:
        """Its own."""
        return value

    def loaded(self) -> None:
        """There is no other copy of them."""


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
    """Forward and backward over a step's batch, in one process.

    The gradient is the canonical sum over micro-batches, divided once by the number of valid units and, in the same
    multiplication, clipped to `clip_norm` (0: not clipped).
    """
    starts = range(0, len(batch), micro_batch_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = GradientSum(gradient_holders(parameters), len(starts))
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
    norm_of_sum = global_norm(gradients_of(parameters))
    # One transfer from the device, one synchronisation a step.
    units_value, total_value, norm_value = torch.stack([units, total, norm_of_sum]).tolist()
    check_units(units_value)
    norm = norm_value / units_value
    torch._foreach_mul_(grads, clip_factor(norm, clip_norm) / units_value)
    return StepGradient(total_value / units_value, units_value, norm, merge_logs(losses))


def check_units(units: float) -> None:
    """Refuse a step in which there is nothing to learn."""
    if units == 0:
        raise ValueError(
            "a step without a single valid unit: every label of its batch is masked; check the source's masks and "
            "lengths, or use a larger batch"
        )


def non_finite_slots(
    model: nn.Module, objective: Objective, batch: Batch, keys: Keys, *, device: torch.device, autocast: Autocast
) -> list[int]:
    """The slots whose own loss or gradient is not finite, found by computing each alone; gradients are dropped."""
    found, holders = [], gradient_holders(model.parameters())
    for row in range(len(batch)):
        with autocast():
            loss = objective(model, batch.rows(row, row + 1).to(device), keys.rows(row, row + 1))
        _drop(holders)
        if loss.sum.requires_grad:
            loss.sum.backward()
        grads = [holder.grad for holder in holders if holder.grad is not None]
        finite = bool(torch.isfinite(loss.sum)) and all(bool(torch.isfinite(g).all()) for g in grads)
        if not finite:
            found.append(int(batch.slots_B[row]))
    _drop(holders)
    return found


def _drop(holders: Sequence[HasGradient]) -> None:
    for holder in holders:
        holder.grad = None
