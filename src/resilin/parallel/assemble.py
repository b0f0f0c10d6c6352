"""From a worker's part of a model to an engine and an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from resilin.layout import ParamSpec
from resilin.nouns import Objective, Optimizer
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.owned_optimizer import OwnedOptimizer
from resilin.parallel.ownership import Ownership
from resilin.parallel.reduction import Reduction
from resilin.parallel.step import Autocast
from resilin.parallel.workers import Passes, Trained, Workers
from resilin.parallel.world import World

DENSE, EXPERTS = "dense", "experts"
AXES = {DENSE: ("rep", "dp", "cp"), EXPERTS: ("rep", "edp")}
"""The mesh axes over which gradients are summed and optimizer states divided."""


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """What a worker's parameter is of the whole model's.

    Attributes:
        spec: how the mesh cuts it, without the optimizer's own cut.
        sum_over: groups in which each rank has only a part of the gradient's sum.
        counted: whether this worker's part counts in the gradient's norm: of copies in one data replica, one does.
    """

    spec: ParamSpec
    sum_over: tuple[Group, ...] = ()
    counted: bool = True


@dataclass(frozen=True)
class Assembled:
    """A worker's engine and optimizer, and what its state is made of.

    Attributes:
        engine: of the run.
        optimizer: of the run.
        owned: for each reduction who owns what; parameters are numbered as in its `names`.
    """

    engine: Workers
    optimizer: Optimizer
    reductions: Mapping[str, Reduction]


def reduction_of(local: LocalParameter, world: World) -> str:
    """The reduction that a parameter belongs to."""
    expert = world.axis("ep") > 1 and any(cut.axis == "ep" for cut in local.spec.cuts)
    return EXPERTS if expert else DENSE


def assemble(
    world: World,
    passes: Passes,
    locals_: Mapping[str, LocalParameter],
    build: Callable[[Mapping[str, nn.Parameter]], Optimizer],
    *,
    order: Sequence[str],
    keep_whole: set[str],
    objective: Objective,
    micro_batch_size: int,
    clip_norm: float,
    exact: bool,
    device: torch.device,
    autocast: Autocast,
    model: nn.Module | None = None,
) -> Assembled:
    """An engine and an optimizer under ZeRO-1.

    Args:
        world: all workers.
        passes: of this one.
        locals_: of its parameters, by name; what is not there is whole.
        build: makes the optimizer of what is owned.
        order: names of all trained parameters of the whole model.
        keep_whole: names of parameters that one rank has to own in whole.
        objective, micro_batch_size, clip_norm, device, autocast, model: as for `Workers`.
        exact: whether sums have the order of one process. Sequences that are divided, and experts that are, leave no
            such order: there the workers' sums are added in the order of workers.

    Raises:
        ParallelError: a trained parameter is not known to the whole model, or cannot be owned so.
    """
    if world.axis("cp") > 1 or world.axis("ep") > 1:
        exact = False
    rows = {name: row for row, name in enumerate(order)}
    found: dict[str, list[tuple[str, nn.Parameter]]] = {DENSE: [], EXPERTS: []}
    trained: dict[str, Trained] = {}
    for chunk in passes.chunks:
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad or name in trained:
                continue
            if name not in rows:
                raise ParallelError(f"parameter {name!r} is trained here, but the whole model trains none of that name")
            local = locals_.get(name) or LocalParameter(ParamSpec(tuple(parameter.shape), "F32"))
            kind = reduction_of(local, world)
            if name in keep_whole and world.axis("tp") > 1 and any(cut.axis == "tp" for cut in local.spec.cuts):
                raise ParallelError(
                    f"parameter {name!r} is updated as a whole matrix, and parallel.tensor cuts it: use an optimizer "
                    "that works element by element (AdamW, SGD), or parallel.tensor = 1"
                )
            found[kind].append((name, parameter))
            trained[name] = Trained(parameter, kind, local.sum_over, local.counted, rows[name])
    reductions = {}
    for kind, parameters in found.items():
        group = world.group(*AXES[kind])  # by all workers, whether they have such parameters or not
        if parameters:
            sizes = [parameter.numel() for _, parameter in parameters]
            kept = [name in keep_whole for name, _ in parameters]
            ownership = Ownership.of(sizes, group.size, keep_whole=kept)
            reductions[kind] = Reduction(parameters, group, ownership, exact=exact)
    owned = {name: shard for reduction in reductions.values() for name, shard in reduction.shards.items()}
    optimizer = OwnedOptimizer(build(owned), list(reductions.values()))
    engine = Workers(
        world,
        passes,
        trained,
        reductions,
        rows=len(order),
        objective=objective,
        micro_batch_size=micro_batch_size,
        clip_norm=clip_norm,
        exact=exact,
        device=device,
        autocast=autocast,
        model=model,
    )
    return Assembled(engine, optimizer, reductions)
