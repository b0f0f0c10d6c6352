"""A worker's part of a decoder: its stages, its experts, its slices of matrices, its tokens of each row.

The order matters: a stage is taken out of the whole model, whose names stay; its experts are divided; then matrices are
cut, the experts' among them; then attention cores learn of other ranks' tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from resilin.layout import LayoutError, ParamSpec, specs_of, staged
from resilin.models.decoder import Decoder
from resilin.nouns import Batch, Objective
from resilin.parallel.assemble import Facts
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.errors import ParallelError
from resilin.parallel.expert.parallelise import parallelise_experts
from resilin.parallel.group import Group
from resilin.parallel.local_model import LocalModel, shapes_of
from resilin.parallel.local_weights import materialise
from resilin.parallel.pipeline.line_orders import LineOrders
from resilin.parallel.pipeline.passes import PipelinePasses
from resilin.parallel.pipeline.schedule import Schedule
from resilin.parallel.pipeline.split import Split
from resilin.parallel.pipeline.stage import Stage, cut, decoder_in
from resilin.parallel.sequence.shard import refuse_whole_rows, shard_sequence
from resilin.parallel.sequence.ulysses import ulysses
from resilin.parallel.settings import ParallelSettings
from resilin.parallel.stages import ops_of, schedule_named, stages_of
from resilin.parallel.step import Autocast
from resilin.parallel.tensor.parallelise import parallelise, plan_of
from resilin.parallel.tied_ends import WEIGHT, TiedEnds
from resilin.parallel.whole_model import Passes, WholeModel
from resilin.parallel.workers import Giver
from resilin.parallel.world import World

if TYPE_CHECKING:
    from resilin.parallel.gathered import Gathered


@dataclass(frozen=True)
class Part:
    """What one worker computes.

    Attributes:
        passes: through its part.
        blueprint: of the whole model.
        facts: of the worker's parameters.
    """

    passes: Passes
    blueprint: Blueprint
    facts: Mapping[str, Facts]


def specs_of_decoder(decoder: nn.Module, world: World) -> dict[str, ParamSpec]:
    """How tensor and expert parallelism cut the parameters of a whole decoder.

    Raises:
        ParallelError: they cannot.
    """
    try:
        specs = specs_of(shapes_of(decoder), plan_of(decoder).whole_rules, strict=False)
    except LayoutError as error:
        raise ParallelError(str(error)) from None
    wanted = {axis for axis in ("tp", "ep") if world.axis(axis) > 1}
    return {
        name: replace(spec, cuts=tuple(cut for cut in spec.cuts if cut.axis in wanted)) for name, spec in specs.items()
    }


@dataclass(frozen=True)
class Cutting:
    """How a decoder is cut, which is the same for all workers.

    Attributes:
        specs: of every parameter.
        split: of the blocks over stages; None: there is one stage.
        rank_of: for each stage the pipeline rank that holds it.
    """

    specs: dict[str, ParamSpec]
    split: Split | None = None
    rank_of: tuple[int, ...] = (0,)


def cutting_of(settings: ParallelSettings, world: World, model: nn.Module, tokens: int) -> Cutting:
    """How a model with a decoder in it is cut; nothing is sent, and the model may be on the meta device.

    Args:
        settings: of the run.
        world: all workers, connected or not.
        model: whole.
        tokens: of a row.

    Raises:
        ParallelError: what cannot be divided so, by name.
    """
    decoder = decoder_in(model)
    if world.axis("tp") > 1 or world.axis("ep") > 1:
        specs = specs_of_decoder(model, world)
    else:
        specs = {name: ParamSpec(shape, dtype) for name, (shape, dtype) in shapes_of(model).items()}
    if world.axis("pp") == 1:
        return Cutting(specs)
    split, rank_of = stages_of(settings, world, decoder, tokens)
    return Cutting(staged(specs, holders_of(decoder, model, split, rank_of)), split, tuple(rank_of))


def schedule_of(settings: ParallelSettings, cutting: Cutting, world: World, micros: int) -> Schedule:
    """The order of a pipeline's actions for so many micro-batches of a data worker.

    Raises:
        ParallelError: there is no such schedule.
    """
    return schedule_named(settings.schedule, len(cutting.rank_of), world.axis("pp"), micros)


def divide_decoder(
    settings: ParallelSettings,
    world: World,
    model: nn.Module,
    objective: Objective,
    *,
    tokens: int,
    keep_whole: set[str],
    device: torch.device,
    autocast: Autocast,
    values: Callable[[str, tuple[int, ...]], Tensor] | None = None,
    compiled: Callable[[nn.Module], object] = lambda decoder: None,
) -> Part:
    """This worker's part of a model with a decoder in it; the model itself is used up.

    Args:
        settings: of the run.
        world: all workers, who call together.
        model: whole, the same at all.
        objective: of the run.
        tokens: of a row.
        keep_whole: names of parameters that one rank has to own in whole.
        device: of this worker.
        autocast: the format of the step.
        values: for a model on the meta device: (name, shape) -> a whole parameter, of which this worker's part is kept.
        compiled: compiles a decoder's blocks in place, once they are cut.

    Raises:
        ParallelError: what cannot be divided so, by name.
    """
    decoder = decoder_in(model)
    trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    cutting = cutting_of(settings, world, model, tokens)
    specs, split, rank_of = cutting.specs, cutting.split, cutting.rank_of
    pipeline = world.group("pp")
    tied = TiedEnds.of(settings, world, decoder, rank_of)
    if split is not None:
        mine = [stage for stage, rank in enumerate(rank_of) if rank == pipeline.index]
        modules = cut(model, split, mine)
    else:
        modules = [model]
    parts = [_cut_further(module, settings, world) for module in modules]
    if values is not None:
        materialise(modules, device)
        for part in parts:
            part.fill(values)
    blueprint = Blueprint(world.degrees, specs, trained, frozenset(keep_whole))
    facts = facts_of(parts, tied)
    _agree(parts, blueprint, world)
    for module in modules:
        compiled(decoder_in(module))
    gathered: Gathered | None = None
    if settings.sharding == "fsdp":
        from resilin.parallel.gathered import Gathered, shard_module

        blueprint = replace(blueprint, sharded=True)
        by_step = settings.gathers_by_step(pipeline.size)
        for module in modules:
            shard_module(module, world, blueprint, device.type, by_step=by_step)
        gathered = Gathered(modules) if by_step else None
    prepare: Callable[[Batch], Batch] = _same
    if world.axis("cp") > 1:
        refuse_whole_rows(objective)
        prepare = partial(shard_sequence, group=world.group("cp"), kind=settings.context_kind)
    how = _How(
        device=device,
        autocast=autocast,
        speaks=world.coordinate("tp") == 0,
        prepare=prepare,
        gathered=gathered,
    )
    if world.axis("pp") == 1:
        passes: Passes = WholeModel(model, objective, model, **how)
    else:
        sequence = world.axis("tp") if settings.sequence else 1
        stages = [Stage(number, module, sequence) for number, module in zip(mine, modules, strict=True)]
        passes = _in_a_line(settings, pipeline, stages, rank_of, objective, tied, how)
    return Part(passes, blueprint, facts)


class _How(TypedDict):
    """What passes of any kind are given."""

    device: torch.device
    autocast: Autocast
    speaks: bool
    prepare: Callable[[Batch], Batch]
    gathered: Gathered | None


def _in_a_line(
    settings: ParallelSettings,
    pipeline: Group,
    stages: Sequence[Stage],
    rank_of: Sequence[int],
    objective: Objective,
    tied: TiedEnds | None,
    how: _How,
) -> PipelinePasses:
    in_order = tied is not None and tied.in_order
    weights = [p for stage in stages for name, p in stage.module.named_parameters() if name.endswith(WEIGHT)]
    ops = partial(ops_of, settings, len(rank_of), pipeline.size, pipeline.index, in_order)
    return PipelinePasses(
        stages,
        LineOrders(ops, rank_of, pipeline.index),
        objective,
        peers=pipeline.ranks,
        number=pipeline.index,
        group=pipeline,
        tied=weights[0] if in_order and weights else None,
        **how,
    )


def _same(batch: Batch) -> Batch:
    return batch


def _cut_further(module: nn.Module, settings: ParallelSettings, world: World) -> LocalModel:
    local = LocalModel.of(module)
    if world.axis("ep") > 1 and any(name.endswith("experts") for name, _ in module.named_modules()):
        local = parallelise_experts(local, world.group("ep"))
    if world.axis("tp") > 1:
        local = parallelise(local, plan_of(module), world.group("tp"), sequence=settings.sequence)
    if world.axis("cp") > 1:
        if settings.context_kind == "ring":
            from resilin.parallel.sequence.ring import ring

            ring(module, world.group("cp"))
        else:
            ulysses(module, world.group("cp"))
    return local


def holders_of(decoder: Decoder, model: nn.Module, split: Split, rank_of: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """For each parameter the pipeline ranks that have it.

    Args:
        decoder: in the model.
        model: whole; it may be an outline.
        split: of the blocks over stages.
        rank_of: for each stage the rank that holds it.
    """
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    found: dict[str, tuple[int, ...]] = {}
    last = rank_of[-1]
    for name, _ in model.named_parameters():
        inner = name.removeprefix(f"{prefix}." if prefix else "")
        if inner.startswith("blocks."):
            found[name] = (rank_of[split.stage_of(int(inner.split(".")[1]))],)
        elif inner.startswith("embed."):
            found[name] = tuple(sorted({rank_of[0], last})) if decoder.head is None else (rank_of[0],)
        elif inner.startswith(("norm.", "head.")):
            found[name] = (last,)
    return found


def facts_of(parts: Sequence[LocalModel], tied: TiedEnds | None = None) -> dict[str, Facts]:
    """What the parameters of a worker's stages are to the sums over workers, by name.

    Args:
        parts: the stages, after all axes have cut them.
        tied: of a weight that is at both ends of a pipeline.
    """
    found: dict[str, Facts] = {}
    for part in parts:
        for name, known in part.parameters.items():
            facts = Facts(known.sum_over, counted=known.first)
            if tied is not None and tied.ends.size > 1 and name.endswith(WEIGHT):
                last = Giver(tied.ends, tied.ends.size - 1)
                if tied.in_order:
                    facts = replace(facts, agreement=last, counted=facts.counted and last.is_here)
                else:
                    facts = Facts((*known.sum_over, tied.ends), counted=known.first and last.is_here)
            found[name] = facts
    return found


def _agree(parts: Sequence[LocalModel], blueprint: Blueprint, world: World) -> None:
    """What was cut has the shapes that the blueprint, which checkpoints go by, says.

    Raises:
        ParallelError: naming the parameter.
    """
    for part in parts:
        for name, parameter in part.module.named_parameters():
            mesh = blueprint.mesh(blueprint.reduction_of(name))
            said = blueprint.specs[name].local_shapes(mesh)[world.rank]
            if said != tuple(parameter.shape):
                raise ParallelError(
                    f"parameter {name!r} has shape {list(parameter.shape)} at worker {world.rank}, where its "
                    f"specification says {list(said or ())}"
                )
