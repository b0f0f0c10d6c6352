"""From a worker's part of a model to an engine and an optimizer under ZeRO-1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from resilin.nouns import Objective, Optimizer
from resilin.optim.rows import rows_of
from resilin.parallel.blueprint import DENSE, EXPERTS, REDUCED_OVER, Blueprint
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.owned_optimizer import OwnedOptimizer
from resilin.parallel.ownership import Ownership
from resilin.parallel.reduction import Reduced, Reduction
from resilin.parallel.sharded import FsdpShards
from resilin.parallel.step import Autocast
from resilin.parallel.whole_model import Passes
from resilin.parallel.workers import Agreement, Trained, Workers
from resilin.parallel.world import World


@dataclass(frozen=True, slots=True)
class Facts:
    """What a worker's parameter is to the sums over workers.

    Attributes:
        sum_over: groups in which each rank has only a part of the gradient's sum.
        agreement: with ranks of other reductions that have the same parameter.
        counted: whether this worker's part counts in the gradient's norm: of copies in one data replica, one does.
    """

    sum_over: tuple[Group, ...] = ()
    agreement: Agreement | None = None
    counted: bool = True


@dataclass(frozen=True)
class Assembled:
    """A worker's engine and optimizer.

    Attributes:
        engine: of the run.
        optimizer: of the run.
        reductions: who owns what, by name.
    """

    engine: Workers
    optimizer: Optimizer
    reductions: Mapping[str, Reduced]


def assemble(
    world: World,
    passes: Passes,
    blueprint: Blueprint,
    build: Callable[[Mapping[str, nn.Parameter]], Optimizer],
    *,
    objective: Objective,
    micro_batch_size: int,
    clip_norm: float,
    exact: bool,
    device: torch.device,
    autocast: Autocast,
    facts: Mapping[str, Facts] | None = None,
    model: nn.Module | None = None,
    filled: bool = True,
) -> Assembled:
    """An engine and an optimizer.

    Args:
        world: all workers.
        passes: of this one.
        blueprint: of the whole model.
        build: makes the optimizer of what is owned, by the names of parameters.
        objective: of the run.
        micro_batch_size: as for `Workers`, like what follows.
        clip_norm: of the gradient.
        exact: whether sums have the order of one process. Sequences that are divided, and experts that are, leave no
            such order: there the workers' sums are added in the order of workers. FSDP has an order of its own.
        device: where batches go.
        autocast: the format of the step.
        facts: of this worker's parameters, by name; what is not there is whole.
        model: that looks for slots that are not finite.
        filled: whether the parameters have their weights; False: the engine is told once they are `loaded`.

    Raises:
        ParallelError: a trained parameter is not known to the whole model, or cannot be owned so.
    """
    if world.axis("cp") > 1 or world.axis("ep") > 1 or blueprint.sharded:
        exact = False
    lockstep = blueprint.sharded or world.axis("ep") > 1
    lent = [p for chunk in passes.chunks for p in chunk.parameters() if p.requires_grad and rows_of(p) is not None]
    found: dict[str, list[tuple[str, nn.Parameter]]] = {DENSE: [], EXPERTS: []}
    trained: dict[str, Trained] = {}
    for chunk in passes.chunks:
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad or name in trained or rows_of(parameter) is not None:
                continue
            _check(name, blueprint)
            fact, kind = (facts or {}).get(name, Facts()), blueprint.reduction_of(name)
            found[kind].append((name, parameter))
            counted = fact.counted and (not blueprint.sharded or world.coordinate("rep") == 0)
            trained[name] = Trained(parameter, kind, fact.sum_over, fact.agreement, counted, blueprint.rows[name])
    reductions: dict[str, Reduced] = {}
    for kind, parameters in found.items():
        group = world.group(*REDUCED_OVER[kind])  # by all workers, whether they have such parameters or not
        if parameters and blueprint.sharded:
            sums = {name: trained[name].sum_over for name, _ in parameters}
            if kind == EXPERTS and world.axis("edp") == 1:  # FSDP has left them as they are
                sums = {name: (*groups, world.group("rep")) for name, groups in sums.items()}
            reductions[kind] = FsdpShards(parameters, sums, group)
        elif parameters:
            sizes = tuple(parameter.numel() for _, parameter in parameters)
            whole = tuple(blueprint.whole_owners.get(name) for name, _ in parameters)
            ownership = Ownership(sizes, blueprint.table(kind), whole, group.size)
            given = {n for n, _ in parameters if (by := trained[n].agreement) is not None and by.given}
            reductions[kind] = Reduction(parameters, group, ownership, exact=exact, given=given, filled=filled)
    owned = {name: shard for reduction in reductions.values() for name, shard in reduction.shards.items()}
    optimizer = OwnedOptimizer(build(owned), list(reductions.values()))
    engine = Workers(
        world,
        passes,
        trained,
        reductions,
        rows=len(blueprint.trained),
        objective=objective,
        micro_batch_size=micro_batch_size,
        clip_norm=clip_norm,
        exact=exact,
        device=device,
        autocast=autocast,
        # A slot by itself is computed where nobody else has to compute, or holds tokens, at the same time.
        model=None if lockstep or world.axis("cp") > 1 else model,
        lockstep=lockstep,
        lent=lent,
    )
    return Assembled(engine, optimizer, reductions)


def _check(name: str, blueprint: Blueprint) -> None:
    if name not in blueprint.rows:
        raise ParallelError(f"parameter {name!r} is trained here, but the whole model trains none of that name")
    cut = blueprint.degrees.tensor > 1 and any(cut.axis == "tp" for cut in blueprint.specs[name].cuts)
    if name in blueprint.keep_whole and cut:
        raise ParallelError(
            f"parameter {name!r} is updated as a whole matrix, and parallel.tensor cuts it: use an optimizer that "
            "works element by element (AdamW, SGD), or parallel.tensor = 1"
        )
