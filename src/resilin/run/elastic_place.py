"""A worker's place in a view: what of the model it computes, with which engine. What it had before stays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from resilin.checkpoint.folder import CheckpointFolder
from resilin.cluster.view import View
from resilin.cluster.view_blueprint import ViewBlueprint
from resilin.cluster.view_world import ViewWorld
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.flops import block_flops_per_token, head_flops_per_token
from resilin.models.initial import initial_value
from resilin.models.stage_span import Elsewhere
from resilin.nouns import Objective, Source
from resilin.parallel.assemble import Assembled, Facts
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.degrees import Degrees
from resilin.parallel.errors import ParallelError
from resilin.parallel.expert.parallelise import parallelise_experts, refuse_too_few, stacked_experts
from resilin.parallel.expert.table import ExpertTable
from resilin.parallel.local_model import LocalModel
from resilin.parallel.local_weights import memory_for
from resilin.parallel.part import facts_of, holders_of, specs_of_decoder
from resilin.parallel.pipeline.member_orders import MemberOrders
from resilin.parallel.pipeline.passes import Orders, PipelinePasses
from resilin.parallel.pipeline.simulate import Costs
from resilin.parallel.pipeline.split import Split
from resilin.parallel.pipeline.stage import Stage, cut, decoder_in
from resilin.parallel.pipeline.tick_orders import TickOrders
from resilin.parallel.settings import ParallelSettings
from resilin.parallel.tensor.parallelise import parallelise, plan_of
from resilin.parallel.tied_ends import WEIGHT, adds_tied_in_order
from resilin.parallel.unlike_ends import UnlikeEnds
from resilin.parallel.whole_model import Passes, WholeModel
from resilin.parallel.world import World
from resilin.precision.autocast import Precision
from resilin.run.divided import Divided, assembled, tokens_of
from resilin.run.elastic import Elastic
from resilin.run.elastic_dealing import Dealing
from resilin.run.elastic_placing import Placed
from resilin.run.settings import RunSettings


def elastic_degrees(parallel: ParallelSettings) -> Degrees:
    """The degrees that a run begins with; stages may have unlike numbers of workers, of which the largest is told.

    Raises:
        ParallelError: the workers cannot be divided so.
    """
    workers, stages, tensor = parallel.workers, parallel.pipeline, parallel.tensor
    if parallel.data == "auto" and isinstance(stages, int) and isinstance(tensor, int):
        if workers % tensor:
            raise ParallelError(
                f"{workers} workers are no whole teams of {tensor} (parallel.tensor): start "
                f"{workers // tensor * tensor} or {-(-workers // tensor) * tensor}"
            )
        if workers < stages * tensor:
            teams = f" of teams of {tensor}" if tensor > 1 else ""
            raise ParallelError(
                f"{workers} workers cannot hold {stages} pipeline stages{teams}: start {stages * tensor} or more"
            )
        workers = -(-workers // (stages * tensor)) * stages * tensor
    # How many share a set of experts follows from how many there are, at any time.
    return parallel.model_copy(update={"expert": 1}).degrees(workers)


def check_elastic(settings: RunSettings, degrees: Degrees, device: torch.device) -> None:
    """Refuse what cannot change while it runs.

    Raises:
        ParallelError: what it is.
    """
    parallel = settings.parallel
    if degrees.workers != degrees.data * degrees.pipeline * degrees.tensor:
        raise ParallelError(
            f"workers come and go with parallel.data, parallel.pipeline, parallel.tensor and parallel.expert, not "
            f"{degrees}; other kinds of parallelism need elastic = false"
        )
    for axis in ("tensor", "expert"):
        if getattr(parallel, axis) != 1 and settings.precision.compile:
            raise ParallelError(
                f"compiled code of parallel.{axis} knows the groups it was made with, which an elastic run replaces: "
                f"set precision.compile = false, or parallel.{axis} = 1"
            )
    if parallel.expert > 1:
        _check_experts(settings)
    if settings.memory.experts is not None:
        raise ParallelError(
            "[memory.experts] keeps experts on a worker's own disk, where no other can go on from them: set "
            "cluster.elastic = false, or leave it out"
        )
    if parallel.sharding != "zero1":
        raise ParallelError(f"an elastic run keeps parallel.sharding = 'zero1', not {parallel.sharding!r}")
    if not settings.train.micro_batch_size:
        raise ParallelError(
            "an elastic run deals whole micro-batches, which must not depend on how many workers there are: set "
            "train.micro_batch_size, best to train.batch_size / (a few times the number of workers)"
        )
    if device.type != "cpu":
        raise ParallelError(f"workers come and go on CPUs, over gloo; this one computes on {device.type}")
    if degrees.pipeline == 1:
        return
    if parallel.schedule != "1f1b" or parallel.chunks > 1:
        raise ParallelError(
            f"stages whose numbers of workers change need parallel.schedule = '1f1b' and chunks = 1, not "
            f"{parallel.schedule!r} and {parallel.chunks}"
        )
    layers = settings.model.layers if isinstance(settings.model, DecoderSettings) else degrees.pipeline
    if layers < degrees.pipeline:
        raise ParallelError(
            f"{layers} blocks cannot be divided over {degrees.pipeline} pipeline stages: every stage needs one"
        )
    if parallel.layers and (len(parallel.layers) != degrees.pipeline or min(parallel.layers) < 1):
        raise ParallelError(
            f"parallel.layers names stages of {', '.join(map(str, parallel.layers))} blocks; wanted are "
            f"{degrees.pipeline} stages (parallel.pipeline), of one block at least"
        )


def _check_experts(settings: RunSettings) -> None:
    if isinstance(settings.model, DecoderSettings):
        refuse_too_few(settings.model, settings.parallel.expert)


class WholePlacing:
    """Every worker has the whole model.

    Args:
        settings: of the run; its steps are known.
        model: the whole one.
        objective: of the run.
        compiled: compiles what the objective calls, or gives it as it is.
        device: of this worker.
        precision: of the run.
    """

    costs: tuple[float, ...] = ()
    experts: frozenset[str] = frozenset()

    def __init__(
        self,
        settings: RunSettings,
        model: nn.Module,
        objective: Objective,
        compiled: Callable[[nn.Module], nn.Module | None],
        *,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.whole = Blueprint.uncut(model, Degrees(), settings.optimizer.keeps_whole(model))
        self._model, build = model, settings.optimizer.owning(model, settings.train.steps)
        passes: Passes = WholeModel(
            model, objective, compiled(model) or model, device=device, autocast=precision.autocast
        )
        self._assemble = lambda world, blueprint, filled: assembled(
            settings,
            world,
            passes,
            blueprint,
            build,
            objective,
            device=device,
            precision=precision,
            model=model,
            filled=filled,
        )

    def holders(self, view: View) -> Mapping[str, tuple[int, ...]]:
        """No stage has anything for itself."""
        return {}

    def build(self, world: ViewWorld, blueprint: Blueprint, dealing: Dealing, *, begins: bool) -> Placed:
        """Engine and optimizer of a view; the model stays."""
        return Placed(self._model, self._assemble(world, blueprint, begins))


class StagePlacing:
    """Every worker has one stage of a decoder, or a part of it, of which there may be another division in every view.

    Blocks that a worker has already stay the objects they are, compiled code and all. Where matrices are cut over a
    team, or workers have experts between them, modules talk to others, and are made anew around the same parameters.

    Args:
        settings: of the run; its steps are known.
        model: the whole one, or its outline; only names and shapes are kept of it, but for what it begins with.
        objective: of the run.
        source: of the run.
        compiled: compiles a decoder's blocks in place.
        device: of this worker.
        precision: of the run.

    Raises:
        ParallelError: the model cannot be divided so.
    """

    def __init__(
        self,
        settings: RunSettings,
        model: nn.Module,
        objective: Objective,
        source: Source,
        compiled: Callable[[nn.Module], object],
        *,
        device: torch.device,
        precision: Precision,
    ) -> None:
        decoder = decoder_in(model)
        degrees = elastic_degrees(settings.parallel)
        self._settings, self._objective, self._compiled, self._slots = settings, objective, compiled, source.slots
        self._device, self._precision = device, precision
        if next(model.parameters()).device.type == "meta":
            known, seed = decoder.settings, settings.seed
            self._initial: Callable[[str, tuple[int, ...]], Tensor] = lambda name, shape: initial_value(
                name, torch.Size(shape), known, seed
            )
            self._outline = model
        else:
            values = dict(model.named_parameters())
            self._initial = lambda name, shape: values[name].detach()
            self._outline = copy.deepcopy(model).to("meta")
        whole = Blueprint.uncut(self._outline, Degrees(), settings.optimizer.keeps_whole(self._outline))
        if degrees.tensor > 1:
            alone = Degrees(tensor=degrees.tensor)
            whole = replace(whole, degrees=alone, specs=specs_of_decoder(self._outline, World(alone)))
        self.whole = whole
        self._build = settings.optimizer.owning(self._outline, settings.train.steps)
        self.experts = stacked_experts(self._outline) if settings.parallel.expert > 1 else frozenset()
        if not self.experts and settings.parallel.expert > 1:
            raise ParallelError("parallel.expert divides experts, and the model has none: leave it 1")
        self._has: tuple[int, ...] = ()  # of every layer's experts, this worker
        if self.experts and degrees.pipeline > 1:  # who computes a slot, and with whom, depends on the stage
            fast = settings.parallel.model_copy(update={"reduction": "fast"})
            self._settings = settings.model_copy(update={"parallel": fast})
        tokens, shape = tokens_of(source, model), decoder.settings
        self.costs = (
            *(block_flops_per_token(shape, layer, tokens) for layer in range(shape.layers)),
            head_flops_per_token(shape),
        )
        self._module: nn.Module | None = None
        self._part = 0  # of every matrix, that this worker has

    def holders(self, view: View) -> Mapping[str, tuple[int, ...]]:
        """By parameter its stage."""
        stages = range(len(view.stages))
        return holders_of(decoder_in(self._outline), self._outline, Split(view.layers), tuple(stages))

    def build(self, world: ViewWorld, blueprint: Blueprint, dealing: Dealing, *, begins: bool) -> Placed:
        """This worker's stage, with engine and optimizer."""
        tensor = world.axis("tp")
        alone = tensor == 1 and not self.experts
        local, fresh = self._stage(world.view, world.stage) if alone else self._stage_part(world)
        module = local.module
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                # What is frozen is as it was in the beginning: no copy has it.
                if name in fresh and (begins or not parameter.requires_grad):
                    parameter.copy_(local.part(name, self._initial(name, local.parameters[name].spec.shape)))
                    fresh.remove(name)
        self._module = module
        if self.experts and len(world.view.stages) == 1:
            return self._with_experts(world, blueprint, local, fresh, begins)
        ends = self._ends(world, local)
        costs = Split(world.view.layers).costs(self.costs[:-1], 0.0, self.costs[-1])
        sizes, each = [len(stage.teams) for stage in world.view.stages], Costs(forward=costs, input=costs, weight=costs)
        orders: Orders
        if self.experts:
            micro = self._settings.train.micro_batch_size
            orders = TickOrders(sizes, world.line.index, self._slots, micro, dealing.evaluated, each)
        else:
            tied = adds_tied_in_order(self._settings.parallel, world, decoder_in(self._outline))
            orders = MemberOrders(sizes, world.line.index, dealing.todo, dealing.evaluated, each, tied=tied)
        passes = PipelinePasses(
            [Stage(world.stage, module, tensor if self._settings.parallel.sequence else 1)],
            orders,
            self._objective,
            peers=world.line.ranks,
            number=world.line.index,
            group=world.line,
            speaks=world.coordinate("tp") == 0,
            device=self._device,
            autocast=self._precision.autocast,
            tied=module.get_parameter(self._tied_name) if ends is not None and ends.in_order else None,
            between=self._stacked(module),
        )
        facts = facts_of([local])
        if ends is not None:  # of copies, that of the first stage counts
            name = self._tied_name
            counted = facts[name].counted and world.stage == 0
            facts[name] = replace(facts[name], agreement=ends, counted=counted)
        return Placed(module, self._assembled(world, passes, blueprint, facts, begins), frozenset(fresh), passes.pace)

    def _with_experts(
        self, world: ViewWorld, blueprint: Blueprint, local: LocalModel, fresh: set[str], filled: bool
    ) -> Placed:
        """The whole model, but for experts that others have: all of a stage's workers pass through it together."""
        passes = WholeModel(
            local.module,
            self._objective,
            local.module,
            device=self._device,
            autocast=self._precision.autocast,
            speaks=world.coordinate("tp") == 0,
            between=self._stacked(local.module),
        )
        made = self._assembled(world, passes, blueprint, facts_of([local]), filled)
        return Placed(local.module, made, frozenset(fresh))

    def _stacked(self, module: nn.Module) -> list[nn.Parameter]:
        return [parameter for name, parameter in module.named_parameters() if name in self.experts]

    def _assembled(
        self, world: ViewWorld, passes: Passes, blueprint: Blueprint, facts: Mapping[str, Facts], filled: bool
    ) -> Assembled:
        return assembled(
            self._settings,
            world,
            passes,
            blueprint,
            self._build,
            self._objective,
            device=self._device,
            precision=self._precision,
            facts=facts,
            filled=filled,
        )

    @property
    def _tied_name(self) -> str:
        return next(name for name in self.whole.rows if name.endswith(WEIGHT))

    def _ends(self, world: ViewWorld, local: LocalModel) -> UnlikeEnds | None:
        """Where a trained weight is both embedding and head, and this worker has one of them."""
        decoder, view = decoder_in(self._outline), world.view
        tied, last = decoder.head is None and decoder.embed.weight.requires_grad, len(view.stages) - 1
        if not tied or not last or world.stage not in {0, last}:
            return None
        owned = []
        owners = ViewBlueprint(self.whole, view, self.holders(view)).owners(world.coordinate("tp"))
        for each in (owners[0], owners[-1]):
            number = each.names.index(self._tied_name)
            for place in range(len(each.members)):
                owned.append([(run.begin, run.end) for run in each.ownership.runs_of(number, place)])
        in_order = adds_tied_in_order(self._settings.parallel, world, decoder)
        weight = decoder_in(local.module).embed.weight.detach()
        return UnlikeEnds(world.ends, len(owners[0].members), owned, in_order, weight)

    def _stage_part(self, world: ViewWorld) -> tuple[LocalModel, set[str]]:
        """This worker's part of a stage, and the names of its parameters that have no values yet."""
        stage = world.view.stages[world.stage]
        whole = copy.deepcopy(self._outline)
        staged = len(world.view.stages) > 1 or not self.experts
        module = cut(whole, Split(world.view.layers), [world.stage])[0] if staged else whole
        local = LocalModel.of(module)
        if stage.sharing > 1 and self._stacked(module):
            table = ExpertTable(stage.experts, stage.sharing)
            local = parallelise_experts(local, world.group("ep"), dealt=lambda *_: table)
        if world.axis("tp") > 1:
            local = parallelise(local, plan_of(module), world.group("tp"), sequence=self._settings.parallel.sequence)
        same = self._module is not None and self._part == world.coordinate("tp")
        known = dict(self._module.named_parameters()) if self._module is not None and same else {}
        here = stage.experts_of(world.coordinate("ep"))
        if here != self._has:
            known = {name: parameter for name, parameter in known.items() if name not in self.experts}
        self._part, self._has = world.coordinate("tp"), here
        fresh = set()
        for name, parameter in list(module.named_parameters()):
            owner, _, own = name.rpartition(".")
            if name not in known:
                fresh.add(name)
                made = nn.Parameter(memory_for(parameter, self._device).zero_(), parameter.requires_grad)
                made.__dict__.update(parameter.__dict__)
            else:
                made = known[name]
            setattr(module.get_submodule(owner), own, made)
        return local, fresh

    def _stage(self, view: View, stage: int) -> tuple[LocalModel, set[str]]:
        """The module of a stage, and the names of its parameters that have no values yet."""
        module = cut(copy.deepcopy(self._outline), Split(view.layers), [stage])[0]
        decoder = decoder_in(module)
        before = decoder_in(self._module) if self._module is not None else None
        news: list[nn.Module] = []
        for number, block in enumerate(decoder.blocks):
            kept = before.blocks[number] if before is not None else None
            if kept is not None and not isinstance(kept, Elsewhere) and not isinstance(block, Elsewhere):
                decoder.blocks[number] = kept
            elif not isinstance(block, Elsewhere):
                news.append(block)
        for name in ("embed", "norm", "head"):
            inner, kept = getattr(decoder, name), getattr(before, name) if before is not None else None
            if kept is not None and not isinstance(kept, Elsewhere) and not isinstance(inner, Elsewhere):
                setattr(decoder, name, kept)
        fresh = set()
        for name, parameter in list(module.named_parameters()):
            if parameter.device.type == "meta":
                fresh.add(name)
                owner, _, own = name.rpartition(".")
                made = nn.Parameter(memory_for(parameter, self._device), parameter.requires_grad)
                setattr(module.get_submodule(owner), own, made)
        if news:
            self._compiled(nn.ModuleDict({"blocks": nn.ModuleList(news)}))
        return LocalModel.of(module), fresh


def first_place(
    elastic: Elastic,
    settings: RunSettings,
    model: nn.Module,
    objective: Objective,
    source: Source,
    compiled: Callable[[nn.Module], nn.Module | None],
    blocks: Callable[[nn.Module], object],
    *,
    store: Callable[[ViewWorld], CheckpointFolder] | None,
    device: torch.device,
    precision: Precision,
) -> Divided:
    """Wait for this worker's place, and build there.

    Args:
        elastic: speaks with the launcher.
        settings: of the run; its steps are known.
        model: the whole one, or its outline where `starts_as_stage` says so.
        objective: of the run.
        source: of the run.
        compiled: compiles what the objective calls, or gives it as it is.
        blocks: compiles a decoder's blocks in place, or does nothing.
        store: makes the folder of checkpoints.
        device: of this worker.
        precision: of the run.

    Raises:
        ParallelError: the model cannot be divided so.
    """
    place = partial(WholePlacing, settings, model, objective)
    if settings.parallel.pipeline == settings.parallel.tensor == settings.parallel.expert == 1:
        elastic.first(place(compiled, device=device, precision=precision), store)
    else:
        stages = StagePlacing(settings, model, objective, source, blocks, device=device, precision=precision)
        elastic.first(stages, store)
    return Divided(elastic.model, elastic.made.engine, elastic.optimizer, elastic.layout)


def starts_as_stage(settings: RunSettings) -> bool:
    """Whether an elastic worker draws the initial weights of its stage, and never has the whole model."""
    parallel = settings.parallel
    return type(settings.model) is DecoderSettings and not parallel.pipeline == parallel.tensor == parallel.expert == 1
