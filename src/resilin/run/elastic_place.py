"""The first place of a worker of an elastic run: its model and passes are kept, whatever changes around it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from resilin.checkpoint.folder import CheckpointFolder
from resilin.cluster.view_world import ViewWorld
from resilin.nouns import Objective
from resilin.parallel.assemble import Assembled
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.degrees import Degrees
from resilin.parallel.errors import ParallelError
from resilin.parallel.workers import WholeModel
from resilin.precision.autocast import Precision
from resilin.run.divided import Divided, assembled
from resilin.run.elastic import Elastic
from resilin.run.settings import RunSettings


def check_elastic(settings: RunSettings, degrees: Degrees, device: torch.device) -> None:
    """Refuse what cannot change while it runs.

    Raises:
        ParallelError: what it is.
    """
    if degrees.workers != degrees.data:
        raise ParallelError(
            f"workers come and go where every one has the whole model: parallel.data alone, not {degrees}; other kinds "
            "of parallelism need elastic = false"
        )
    if settings.parallel.sharding != "zero1":
        raise ParallelError(f"an elastic run keeps parallel.sharding = 'zero1', not {settings.parallel.sharding!r}")
    if not settings.train.micro_batch_size:
        raise ParallelError(
            "an elastic run deals whole micro-batches, which must not depend on how many workers there are: set "
            "train.micro_batch_size, best to train.batch_size / (a few times the number of workers)"
        )
    if device.type != "cpu":
        raise ParallelError(f"workers come and go on CPUs, over gloo; this one computes on {device.type}")


def first_place(
    elastic: Elastic,
    settings: RunSettings,
    model: nn.Module,
    objective: Objective,
    compiled: Callable[[nn.Module], nn.Module | None],
    *,
    store: Callable[[ViewWorld], CheckpointFolder] | None,
    device: torch.device,
    precision: Precision,
) -> Divided:
    """Wait for this worker's place, and build there.

    Args:
        elastic: speaks with the launcher.
        settings: of the run; its steps are known.
        model: the whole one.
        objective: of the run.
        compiled: compiles what the objective calls, or gives it as it is.
        store: makes the folder of checkpoints.
        device: of this worker.
        precision: of the run.
    """
    passes = WholeModel(model, objective, compiled(model) or model, device=device, autocast=precision.autocast)

    def make(world: ViewWorld, blueprint: Blueprint) -> Assembled:
        return assembled(
            settings, world, passes, blueprint, model, objective, device=device, precision=precision, model=model
        )

    elastic.first(Blueprint.uncut(model, Degrees(), settings.optimizer.keeps_whole(model)), make, store)
    return Divided(model, elastic.made.engine, elastic.optimizer, elastic.layout)
