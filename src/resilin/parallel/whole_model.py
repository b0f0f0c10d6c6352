"""How a worker takes micro-batches forward and backward: what engines ask for, and the way through a whole model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from resilin.keys import Keys
from resilin.nouns import Batch, Loss, Objective
from resilin.parallel.activity import doing
from resilin.parallel.step import Autocast

if TYPE_CHECKING:
    from resilin.parallel.gathered import Gathered

Collect = Callable[[int, int], None]
"""Told the number of some parameters, and the place of a micro-batch among those given, when their gradients of it are
complete in `.grad`."""


class Passes(Protocol):
    """How a worker takes micro-batches forward and backward: through its whole model, or through its stages of it.

    Attributes:
        chunks: the parts of the model that this worker has.
        collected: for each number that `train` gives `collect`, the parameters whose gradients are complete then.
        speaks: whether this worker computes losses; of those that do so for one micro-batch only one speaks.
        in_order: whether a chunk's gradients are complete in the order of micro-batches.
    """

    chunks: Sequence[nn.Module]
    speaks: bool
    in_order: bool

    @property
    def collected(self) -> Sequence[Sequence[nn.Parameter]]:
        """See above."""

    def train(
        self,
        micros: Sequence[tuple[Batch, Keys]],
        collect: Collect,
        losses: dict[int, Loss],
        idle: Collection[int] = (),
    ) -> None:
        """Forward and backward over micro-batches.

        Args:
            micros: of this worker, ascending.
            collect: takes gradients.
            losses: gets the loss, without a graph, of each micro-batch that this worker computes one of.
            idle: places of micro-batches that stand in for none: others have one more, whose tokens come here too.
        """

    def evaluate(self, batches: Sequence[Batch], total: int) -> list[Loss]:
        """Forward only, without randomness.

        Args:
            batches: of this worker.
            total: how many all workers evaluate together.
        """


class WholeModel:
    """Each micro-batch through the whole model, one after another.

    Args:
        model: whose parameters are trained.
        objective: of the run.
        computed: what the objective calls: the model, or its compiled form.
        device: where batches go.
        autocast: the format of the step.
        speaks: whether this worker's losses are counted.
        prepare: takes this worker's part of a batch, where rows are divided.
        gathered: of weights that are gathered once a step; None: each worker has them, or they come and go.
        between: parameters whose gradients are also of tokens that other workers send: experts.
    """

    in_order = True

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        computed: nn.Module,
        *,
        device: torch.device,
        autocast: Autocast,
        speaks: bool = True,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
        gathered: Gathered | None = None,
        between: Collection[nn.Parameter] = (),
    ) -> None:
        self._gathered, self._between = gathered, {id(parameter) for parameter in between}
        self.chunks: Sequence[nn.Module] = (model,)
        self.speaks, self._prepare = speaks, prepare
        self._objective, self._computed, self._device, self._autocast = objective, computed, device, autocast

    @property
    def collected(self) -> Sequence[Sequence[nn.Parameter]]:
        """All, as the model has them now."""
        return [list(self.chunks[0].parameters())]

    def train(
        self,
        micros: Sequence[tuple[Batch, Keys]],
        collect: Collect,
        losses: dict[int, Loss],
        idle: Collection[int] = (),
    ) -> None:
        """Forward, backward, forward, backward, ..."""
        for number, (batch, keys) in enumerate(micros):
            doing("forward and backward of micro-batch", number)
            with self._autocast():
                loss = self._objective(self._computed, self._prepare(batch.to(self._device)), keys)
            if number in idle:
                self._take_others(loss)
                collect(0, number)
                continue
            if self._gathered is not None:
                self._gathered.before_backward(0, last=number == len(micros) - 1)
            loss.sum.backward()
            collect(0, number)
            losses[number] = Loss(loss.sum.detach(), loss.units.detach(), loss.logs)

    def _take_others(self, loss: Loss) -> None:
        """A backward pass of which nothing counts but what others' tokens give the experts here."""
        parameters = [p for p in self.chunks[0].parameters() if p.requires_grad]
        # Of all, not of the experts alone: then tokens' gradients go back to the others in every layer.
        found = torch.autograd.grad(loss.sum * 0, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, found, strict=True):
            if id(parameter) in self._between and grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], total: int) -> list[Loss]:
        """Forward."""
        losses = []
        for batch in batches:
            with self._autocast():
                losses.append(self._objective(self._computed, self._prepare(batch.to(self._device)), None))
        if self._gathered is not None:
            self._gathered.give_up()
        return losses
