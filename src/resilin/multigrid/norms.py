"""A model whose batch norms follow the grid schedule, with exact statistics before each evaluation."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.config import SettingsError, component
from resilin.models.settings import ModelContext, ModelSettings
from resilin.multigrid.pooled import pool_running, processes
from resilin.multigrid.sub_batch_norm import SubBatchNorm
from resilin.nouns import StepView, keeps_weights

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SubBatchNorms(ModelSettings):
    """A model with every batch norm replaced by `SubBatchNorm`; parameters keep their names and values."""

    model: Annotated[ModelSettings, component("resilin.vision.slowfast:SlowFast")]
    """The model."""
    base: Annotated[int, Field(ge=0)] = 8
    """Samples that statistics come from, times the short cycle's multiplier; 0: one split, whatever the batch."""
    precise_batches: Annotated[int, Field(ge=0)] = 200
    """Batches of the long cycle's shape over which statistics are measured anew before each evaluation; 0: never."""

    def build(self, context: ModelContext) -> nn.Module:
        """The model.

        Raises:
            SettingsError: it has no batch norm.
        """
        model = self.model.build(context)
        if not replace_norms(model, self.base):
            raise SettingsError(
                f"model: {type(self.model).__name__} has no batch norm to split; leave SubBatchNorms out"
            )
        if self.precise_batches:
            model.add_module("precise_statistics", PreciseStatistics(self.precise_batches))
        return model


def replace_norms(model: nn.Module, base: int) -> int:
    """Replace every batch norm in place; returns how many there were."""
    count = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, BATCH_NORMS):
                continue
            if not child.affine or not child.track_running_stats:
                raise SettingsError(
                    f"model: the batch norm {name!r} of {type(module).__name__} has no scale or keeps no statistics; "
                    "only ordinary ones can be split"
                )
            new = SubBatchNorm(child.num_features, child.eps, child.momentum, base).to(child.weight.device)
            new.load_state_dict(child.state_dict())
            new.train(child.training)
            setattr(module, name, new)
            count += 1
    return count


def plain_norms(model: nn.Module, dims: int) -> None:
    """Turn every `SubBatchNorm` into the ordinary batch norm over `dims` axes that evaluates alike, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SubBatchNorm):
                setattr(module, name, child.plain(dims))
    if hasattr(model, "precise_statistics"):
        del model.precise_statistics


class PreciseStatistics(nn.Module):
    """Batch norm statistics as plain means over batches of the present weights (Wu and Johnson, 2021, section 3).

    A sub-module without parameters that listens for evaluations; in a forward pass it is the identity. Moving averages
    lag behind the weights, the more so after a change of shape.
    """

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batches = batches
        self._warned = False

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x

    @keeps_weights
    def before_step(self, view: StepView) -> None:
        """Say once where batches are smaller than statistics should come from, however many processes pool theirs."""
        schedule = getattr(view.source, "grid_schedule", None)
        if schedule is None or self._warned:
            return
        self._warned = True
        base = max((m.base for m in view.model.modules() if isinstance(m, SubBatchNorm)), default=0)
        smallest = min(s.base.multiplier for s in schedule.segments) * view.source.batch_size  # type: ignore[attr-defined]
        if smallest < base:
            sys.stderr.write(
                f"resilin: batch norm sees {smallest} samples in the finest shape, fewer than base = {base}: there are "
                "no others to take statistics from; plain batch norm is used there\n"
            )

    @torch.no_grad()
    def before_evaluation(self, view: StepView) -> None:
        """Measure the statistics anew on the next batches of the training source, at the long cycle's shape.

        Several processes take their parts of each batch and end with the same statistics.
        """
        model, source = view.model, view.source
        norms = [m for m in model.modules() if isinstance(m, SubBatchNorm)]
        device = next(model.parameters()).device
        kept = [(norm.momentum, norm.group, norm.num_batches_tracked.clone()) for norm in norms]
        trained = model.training
        model.train()
        for norm in norms:
            norm.momentum = None  # the plain mean over batches
            norm.group = 0
            norm.num_batches_tracked.zero_()
        for number in range(self.batches):
            inputs = _batch(source, view.step, number)
            if inputs is None:
                break
            with view.autocast():
                model(inputs.to(device))
        if processes()[1] > 1:
            for norm in norms:
                pool_running(norm)
        for norm, (momentum, group, seen) in zip(norms, kept, strict=True):
            norm.momentum, norm.group = momentum, group
            norm.num_batches_tracked.copy_(seen)
        model.train(trained)


def _batch(source: Any, step: int, number: int) -> Tensor | None:
    """This process's inputs of a batch at the present long-cycle shape; None after the end of the data."""
    if getattr(source, "grid_schedule", None) is not None:
        # The step is the one to come; the shape is that of the step just taken.
        step = max(step - 1, 0)
        slots = source.base_slots(step, number)
        return source.base_batch(step, number, _share(slots))["inputs"] if slots else None
    slots = source.slots(step + number)
    if not slots:
        return None
    inputs: Tensor = source.fetch(step + number, _share(slots))["inputs"]
    return inputs


def _share(count: int) -> range:
    """The slots of `count` that are this process's."""
    rank, world = processes()
    return range(rank * count // world, (rank + 1) * count // world)
