"""A run's model, engine and optimizer as one of many workers has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.process_group import ProcessGroup
from resilin.config import UserError
from resilin.memory.tiered_optimizer import TieredOptimizer, take_experts
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.initial import initial_value
from resilin.models.settings import ModelContext
from resilin.nouns import Objective, Optimizer, Source, State
from resilin.parallel.assemble import Assembled, Facts, assemble
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.errors import ParallelError
from resilin.parallel.part import Part, divide_decoder
from resilin.parallel.pipeline.passes import PipelinePasses
from resilin.parallel.pipeline.trace import Trace
from resilin.parallel.sharded import local
from resilin.parallel.stages import splits_backward
from resilin.parallel.state import StateLayout, like
from resilin.parallel.whole_model import Passes, WholeModel
from resilin.parallel.workers import Workers
from resilin.parallel.world import World
from resilin.precision.autocast import Precision
from resilin.precision.compiled import compile_model
from resilin.run.run import Run
from resilin.run.settings import RunSettings

if TYPE_CHECKING:
    from resilin.parallel.gathered import Gathered


@dataclass(frozen=True)
class Divided:
    """What `build_run` needs of a worker.

    Attributes:
        model: this worker's part; of several stages all together.
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
    source: Source,
    compiled: Callable[[nn.Module], nn.Module | None],
    *,
    device: torch.device,
    precision: Precision,
    folder: Path | None = None,
) -> Divided:
    """This worker's part of a run.

    Args:
        settings: of the run; its steps are known.
        world: all workers.
        model: the whole model, or its outline where `starts_as_outline` says so; used up.
        objective: of the run.
        source: of the run.
        compiled: compiles what the objective calls, or gives it as it is.
        device: of this worker.
        precision: of the run.
        folder: of the run, where a measured schedule goes, and experts that have no room in memory.

    Raises:
        ParallelError, UserError: the model cannot be divided so.
    """
    outline = _outline(settings, model, source)
    whole = settings.optimizer.keeps_whole(outline)
    check_division(settings, world, model, source, whole)
    if _whole_everywhere(world):
        blueprint = Blueprint.uncut(model, world.degrees, whole)
        gathered: Gathered | None = None
        if settings.parallel.sharding == "fsdp":
            from resilin.parallel.gathered import Gathered, shard_module

            blueprint, by_step = replace(blueprint, sharded=True), settings.parallel.gathers_by_step(1)
            shard_module(model, world, blueprint, device.type, by_step=by_step)
            gathered = Gathered([model]) if by_step else None
        passes = WholeModel(
            model,
            objective,
            compiled(model) or model,
            device=device,
            autocast=precision.autocast,
            gathered=gathered,
        )
        part = Part(passes, blueprint, {})
    else:
        precise = settings.precision
        part = divide_decoder(
            settings.parallel,
            world,
            model,
            objective,
            tokens=tokens_of(source, model),
            keep_whole=whole,
            device=device,
            autocast=precision.autocast,
            values=initial_values(settings, model),
            compiled=partial(compile_model, what=bool(precise.compile) and "blocks", mode=precise.compile_mode),
        )
    chunks = part.passes.chunks
    tiers = None
    if settings.memory.experts is not None:
        tiers = take_experts(
            settings.memory.experts,
            settings.optimizer,
            chunks[0],
            settings.train.steps,
            run_folder=folder,
            worker=world.rank,
            outline=outline,
        )
    made = assembled(
        settings,
        world,
        part.passes,
        part.blueprint,
        settings.optimizer.owning(outline, settings.train.steps),
        objective,
        device=device,
        precision=precision,
        facts=part.facts,
        model=model if chunks[0] is model and len(chunks) == 1 else None,
    )
    if settings.parallel.trace and isinstance(part.passes, PipelinePasses) and folder is not None:
        made.engine.trace = Trace(settings.parallel.trace, part.passes, world, folder / "workers" / "schedule.csv")
    mine = chunks[0] if len(chunks) == 1 and not part.blueprint.sharded else WorkerModel(chunks)
    optimizer = made.optimizer if tiers is None else TieredOptimizer(made.optimizer, tiers)
    return Divided(mine, made.engine, optimizer, StateLayout(part.blueprint, world.everyone))


def assembled(
    settings: RunSettings,
    world: World,
    passes: Passes,
    blueprint: Blueprint,
    build: Callable[[Mapping[str, nn.Parameter]], Optimizer],
    objective: Objective,
    *,
    device: torch.device,
    precision: Precision,
    facts: Mapping[str, Facts] | None = None,
    model: nn.Module | None = None,
    filled: bool = True,
) -> Assembled:
    """A worker's engine and optimizer, as the settings want them; see `resilin.parallel.assemble`.

    Args:
        settings: of the run; its steps are known.
        world: all workers.
        passes: of this one.
        blueprint: of the whole model.
        build: makes the optimizer of what is owned, by the names of parameters.
        objective: of the run.
        device: of this worker.
        precision: of the run.
        facts: of this worker's parameters, by name.
        model: that looks for slots that are not finite.
        filled: whether the parameters have their weights.
    """
    return assemble(
        world,
        passes,
        blueprint,
        build,
        objective=objective,
        micro_batch_size=settings.train.micro_batch_size,
        clip_norm=settings.train.clip_norm,
        exact=settings.parallel.reduction == "exact",
        device=device,
        autocast=precision.autocast,
        facts=facts,
        model=model,
        filled=filled,
    )


class WorkerModel(nn.Module):
    """The stages of one worker together: parameters have the names of the whole model, and states are local tensors."""

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self._stages = tuple(stages)
        for number, stage in enumerate(self._stages):
            self.add_module(str(number), stage)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Of all stages, under the names of the whole model."""
        return {name: local(tensor) for stage in self._stages for name, tensor in stage.state_dict().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Fill every stage's own tensors."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Of all stages, under the names of the whole model; shared ones once, unless they are asked for twice."""
        seen: set[int] = set()
        for stage in self._stages:
            for name, parameter in stage.named_parameters(remove_duplicate=remove_duplicate):
                if not remove_duplicate or id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter


def _outline(settings: RunSettings, model: nn.Module, source: Source) -> nn.Module:
    """The whole model's names and shapes, which decide how it is optimized: the model itself may be cut up."""
    found = settings.model.outline(ModelContext(settings.seed, getattr(source, "vocab_size", None)))
    return model if found is None else found


def tokens_of(source: Source, model: nn.Module) -> int:
    """Of a row."""
    length = getattr(source, "sequence_length", None)
    if length is not None:
        return int(length)
    decoder = next((module for module in model.modules() if isinstance(module, Decoder)), None)
    return decoder.settings.max_positions if decoder is not None else 1


def starts_as_outline(settings: RunSettings, world: World) -> bool:
    """Whether a worker draws its part of the initial weights, tensor by tensor, and never has the whole model."""
    return type(settings.model) is DecoderSettings and not _whole_everywhere(world)


def initial_values(settings: RunSettings, model: nn.Module) -> Callable[[str, tuple[int, ...]], torch.Tensor] | None:
    """The values of a model that is an outline only; None where it has them."""
    if not (isinstance(model, Decoder) and next(model.parameters()).device.type == "meta"):
        return None
    decoder = model.settings
    return lambda name, shape: initial_value(name, torch.Size(shape), decoder, settings.seed)


def check_division(settings: RunSettings, world: World, model: nn.Module, source: Source, whole: set[str]) -> None:
    """Refuse what would be wrong, or wait for ever, later on; nothing is sent, and the model may be an outline.

    Raises:
        ParallelError: what it is.
    """
    _check_memory(settings, world)
    if settings.parallel.sharding == "fsdp":
        _check_sharded(settings, world, model, whole)
    if not _whole_everywhere(world):
        _check(settings, world, model, source)


def _check_memory(settings: RunSettings, world: World) -> None:
    """Refuse experts in tiers that more than one worker would have.

    Raises:
        ParallelError: what to set.
    """
    if settings.memory.experts is None:
        return
    degrees = world.degrees
    others = [name for name in ("tensor", "pipeline", "context") if getattr(degrees, name) > 1]
    if others:
        raise ParallelError(
            f"[memory.experts] goes with parallel.data and parallel.expert, not with parallel.{others[0]}: set it to "
            "1, or leave [memory.experts] out"
        )
    if settings.parallel.sharding != "zero1":
        raise ParallelError(
            f"[memory.experts] goes with parallel.sharding = 'zero1', not {settings.parallel.sharding!r}, which "
            "divides weights itself"
        )
    if degrees.expert != degrees.data:
        raise ParallelError(
            f"[memory.experts] keeps each expert at one worker, on its disk, and with data = {degrees.data} and "
            f"expert = {degrees.expert} several would have the same: set parallel.expert = {degrees.data}"
        )


def _whole_everywhere(world: World) -> bool:
    """Whether every worker computes the whole model; experts are divided without taking workers of their own."""
    return world.degrees.data * world.degrees.replicate == world.size and world.degrees.expert == 1


def _check_sharded_stages(settings: RunSettings, model: nn.Module) -> None:
    """Refuse what FSDP cannot do with the stages of a pipeline.

    Raises:
        ParallelError: what it is.
    """
    if splits_backward(settings.parallel.schedule) and settings.parallel.gather == "block":
        raise ParallelError(
            f"parallel.schedule = {settings.parallel.schedule!r} cuts backward passes in halves, and gather = 'block' "
            "takes gradients when a whole one ends: use gather = 'step', or gpipe, 1f1b or interleaved"
        )
    if not isinstance(model, Decoder):
        raise ParallelError(
            f"sharding = 'fsdp' in a pipeline divides a Decoder's stages, and a {type(model).__name__} has more around "
            "its own: use sharding = 'zero1', or pipeline = 1"
        )


def _check_sharded(settings: RunSettings, world: World, model: nn.Module, whole: set[str]) -> None:
    """Refuse what does not go with FSDP.

    Raises:
        ParallelError: what it is.
    """
    degrees, train = world.degrees, settings.train
    if degrees.data * degrees.context == 1:
        raise ParallelError(
            "sharding = 'fsdp' divides weights among data workers, and there is one: raise parallel.data"
        )
    if degrees.pipeline > 1:
        _check_sharded_stages(settings, model)
    if whole:
        raise ParallelError(
            f"{type(settings.optimizer).__name__} updates whole matrices ({min(whole)}), and sharding = 'fsdp' leaves "
            "no worker with one: use sharding = 'zero1', or an optimizer that works element by element"
        )
    size = train.micro_batch_size or -(-train.batch_size // degrees.data)
    if train.batch_size % (size * degrees.data):
        raise ParallelError(
            "sharding = 'fsdp' gathers weights at all workers together, who must have equally many micro-batches: "
            f"train.batch_size ({train.batch_size}) should be a multiple of micro_batch_size * data = {size} * "
            f"{degrees.data}"
        )


def _check(settings: RunSettings, world: World, model: nn.Module, source: Source) -> None:
    """Refuse what would be wrong, or wait for ever, later on.

    Raises:
        ParallelError: what it is.
    """
    degrees, train = world.degrees, settings.train
    if degrees.expert > 1 and not settings.cluster.elastic:
        size = train.micro_batch_size or -(-train.batch_size // degrees.data)
        if train.batch_size % (size * degrees.data):
            raise ParallelError(
                f"parallel.expert sends tokens among workers, who must have equally many micro-batches: "
                f"train.batch_size ({train.batch_size}) should be a multiple of micro_batch_size * data = "
                f"{size} * {degrees.data}"
            )
    if degrees.pipeline > 1 and not train.micro_batch_size:
        raise ParallelError(
            "a pipeline works on several micro-batches at a time: set train.micro_batch_size, best so that every data "
            f"worker has {2 * degrees.pipeline} or more of them in a step"
        )
    listening = [type(m).__name__ for m in model.modules() if hasattr(m, "before_step") or hasattr(m, "after_step")]
    if listening:
        raise ParallelError(
            f"{listening[0]} changes between steps by looking at whole tensors: it goes with data parallelism only"
        )


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
