"""A run's model, engine and optimizer as one of many workers has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.process_group import ProcessGroup
from resilin.config import UserError
from resilin.nouns import Objective, Optimizer, State
from resilin.parallel.assemble import assemble
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.state import StateLayout, like
from resilin.parallel.workers import WholeModel, Workers
from resilin.parallel.world import World
from resilin.precision.autocast import Precision
from resilin.run.run import Run
from resilin.run.settings import RunSettings


@dataclass(frozen=True)
class Divided:
    """What `build_run` needs of a worker.

    Attributes:
        model: this worker's part.
        engine: computes steps with all others.
        optimizer: of what is owned here.
        layout: of the run's state.
    """

    model: nn.Module
    engine: Workers
    optimizer: Optimizer
    layout: StateLayout


def divide(
    settings: RunSettings,
    world: World,
    model: nn.Module,
    objective: Objective,
    compiled: Callable[[nn.Module], nn.Module | None],
    *,
    device: torch.device,
    precision: Precision,
) -> Divided:
    """This worker's part of a run.

    Args:
        settings: of the run; its steps are known.
        world: all workers.
        model: the whole model.
        objective: of the run.
        compiled: compiles what the objective calls, or gives it as it is.
        device: of this worker.
        precision: of the run.

    Raises:
        ParallelError, UserError: the model cannot be divided so.
    """
    blueprint = Blueprint.uncut(model, world.degrees, settings.optimizer.keeps_whole(model))
    passes = WholeModel(model, objective, compiled(model) or model, device=device, autocast=precision.autocast)
    made = assemble(
        world,
        passes,
        blueprint,
        lambda owned: settings.optimizer.build_owned(model, settings.train.steps, owned),
        objective=objective,
        micro_batch_size=settings.train.micro_batch_size,
        clip_norm=settings.train.clip_norm,
        exact=settings.parallel.reduction == "exact",
        device=device,
        autocast=precision.autocast,
        model=model,
    )
    return Divided(model, made.engine, made.optimizer, StateLayout(blueprint, world.everyone))


def coordinator(world: World) -> ProcessGroup:
    """Of saves: over a group of its own, since they go on beside the training. All workers call together."""
    if world.size == 1:
        raise UserError("one worker needs no coordinator")
    return ProcessGroup(torch.distributed.new_group(backend="gloo", group_desc="checkpoint"))


def load_divided(run: Run, store: CheckpointFolder, step: int) -> State:
    """This worker's part of a checkpoint that any number of workers wrote. All workers call together."""
    assert run.layout is not None
    own = run.state_dict()
    part = store.load_part(step, run.layout(own))
    return like(part.tree, own)
