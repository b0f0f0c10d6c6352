"""Who would do what, told before anything starts: each worker's blocks, slots, memory and groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from resilin.cluster.changes import sharing_of
from resilin.config import UserError
from resilin.layout import ParamSpec
from resilin.layout import rank as rank_place
from resilin.layout.dealing import deal
from resilin.models.decoder import Decoder
from resilin.models.memory import activation_bytes
from resilin.models.settings import ModelContext
from resilin.nouns import Source
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.degrees import Degrees
from resilin.parallel.dtypes import DTYPES
from resilin.parallel.errors import ParallelError
from resilin.parallel.expert.table import ExpertTable
from resilin.parallel.micro_batches import even_batches, micro_batches, run_of, shared_batches
from resilin.parallel.part import Cutting, cutting_of, schedule_of
from resilin.parallel.pipeline.messages import lower
from resilin.parallel.pipeline.schedule import F, I, Schedule
from resilin.parallel.pipeline.simulate import simulate
from resilin.parallel.pipeline.tied import heads_kept
from resilin.parallel.tied_ends import adds_tied_in_order
from resilin.parallel.world import World
from resilin.run.build import build_sources, steps_of
from resilin.run.device import choose_device
from resilin.run.divided import check_division, tokens_of
from resilin.run.elastic_place import check_elastic, elastic_degrees
from resilin.run.settings import RunSettings

_AXES = {"pp": "stage", "rep": "replica", "dp": "data", "cp": "context", "tp": "tensor", "ep": "expert"}


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker would do.

    Attributes:
        rank: its number.
        coordinates: where it stands, on the axes that have more than one place.
        blocks: of the model, in runs; a worker has several where a schedule interleaves.
        micro_batches: that it computes in a step.
        slots: of the step that it reads.
        weights: bytes, while a step is computed.
        gradients: bytes of one sum, and of the head's part where it waits for that of an embedding that is tied to it.
        optimizer: bytes of its states.
        activations: bytes at the peak, estimated.
        in_flight: micro-batches whose activations are there at that peak.
    """

    rank: int
    coordinates: dict[str, int]
    blocks: tuple[range, ...]
    micro_batches: int
    slots: Sequence[int]
    weights: int
    gradients: int
    optimizer: int
    activations: int
    in_flight: int

    @property
    def total(self) -> int:
        """Bytes, but for temporaries."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, slots=True)
class Division:
    """A run on its workers.

    Attributes:
        world: the workers.
        shares: of each.
        groups: what groups are for -> the workers of each.
        bubble: the part of the pipeline's time in which nothing is computed, where a backward pass takes two forward
            passes and messages take no time; None: there is no pipeline.
    """

    world: World
    shares: tuple[Share, ...]
    groups: dict[str, list[tuple[int, ...]]]
    bubble: float | None


def who_does_what(settings: RunSettings, workers: int) -> Division:
    """How these settings divide a run.

    Args:
        settings: of the run; its data is opened.
        workers: how many.

    Raises:
        ParallelError: it cannot be divided so, and which degrees could.
        UserError: the model cannot be outlined without building it.
    """
    world = World(degrees_of(settings, workers))
    source = build_sources(settings, validation=False).source
    steps = steps_of(settings, source)
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": steps})})
    outline = settings.model.outline(ModelContext(settings.seed, getattr(source, "vocab_size", None)))
    if outline is None:
        raise UserError(
            f"{type(settings.model).__name__} cannot tell its shapes without being built (it has no `outline`), so who "
            "has what of it is not known before the run starts"
        )
    whole = settings.optimizer.keeps_whole(outline)
    check_division(settings, world, outline, source, whole)
    tokens = tokens_of(source, outline)
    decoder = next((module for module in outline.modules() if isinstance(module, Decoder)), None)
    if decoder is None:
        blueprint, cutting = Blueprint.uncut(outline, world.degrees, whole), None
    else:
        cutting = cutting_of(settings.parallel, world, outline, tokens)
        trained = tuple(name for name, p in outline.named_parameters() if p.requires_grad)
        blueprint = Blueprint(world.degrees, _specs(settings, cutting, world), trained, frozenset(whole))
    blueprint = replace(blueprint, sharded=settings.parallel.sharding == "fsdp")
    weights, gradients, states = _bytes(settings, outline, blueprint)
    shares, bubble = [], None
    for rank in range(workers):
        mine = World(world.degrees, rank)
        slots, count = _work(settings, source, mine)
        schedule = None
        if cutting is not None and cutting.split is not None and count:
            schedule = schedule_of(settings.parallel, cutting, world, count)
            bubble = max(bubble or 0.0, float(simulate(schedule).bubble))
        blocks, flight, kept = _activations(settings, decoder, cutting, schedule, mine, tokens)
        if decoder is not None and schedule is not None and adds_tied_in_order(settings.parallel, mine, decoder):
            gradients[rank] += _waiting(schedule, mine) * decoder.embed.weight.nbytes
        shares.append(
            Share(
                rank, {a: mine.coordinate(a) for a in _AXES if mine.axis(a) > 1}, blocks, count, slots, weights[rank],
                gradients[rank], states[rank], kept, flight,
            )
        )  # fmt: skip
    return Division(world, tuple(shares), _groups(world), bubble)


def _specs(settings: RunSettings, cutting: Cutting, world: World) -> Mapping[str, ParamSpec]:
    """How parameters are cut; members of an elastic run have equally many experts, or one more."""
    ranks = world.axis("ep")
    if not settings.cluster.elastic or ranks == 1:
        return cutting.specs

    def even(spec: ParamSpec) -> ParamSpec:
        table = ExpertTable(deal(spec.shape[0], ranks), ranks)
        return replace(spec, cuts=tuple(table.cut() if cut.axis == "ep" else cut for cut in spec.cuts))

    return {name: even(spec) for name, spec in cutting.specs.items()}


def degrees_of(settings: RunSettings, workers: int) -> Degrees:
    """The degrees of a run; of an elastic one those that it begins with.

    Raises:
        ParallelError: so many workers cannot be divided so, or what cannot change while a run goes on.
    """
    if not settings.cluster.elastic:
        return settings.parallel.degrees(workers)
    whole = settings.parallel.model_copy(update={"workers": workers})
    degrees = elastic_degrees(whole)
    check_elastic(settings, degrees, choose_device(settings.train.device))
    if degrees.workers != workers:
        raise ParallelError(
            f"an elastic run can begin with {workers} workers, in pipeline stages of unlike numbers, and only "
            f"stages of equal ones are shown: look at {degrees.workers} workers"
        )
    return replace(degrees, expert=sharing_of(degrees.data, settings.parallel.expert))


def _work(settings: RunSettings, source: Source, world: World) -> tuple[Sequence[int], int]:
    """Slots and number of micro-batches of a worker."""
    count, micro, stages = source.slots(0), settings.train.micro_batch_size, world.axis("pp")
    data, place, elastic = world.axis("dp"), world.coordinate("dp"), settings.cluster.elastic
    if elastic and settings.parallel.expert > 1 and stages > 1:
        shared = shared_batches(count, micro, [data] * stages)[0]
        each = len(shared) // data
        mine = shared[place * each : (place + 1) * each]
        return [slot for part in mine for slot in part], each
    even = elastic and (world.axis("ep") > 1 or settings.parallel.reduction == "fast") and stages == 1
    micros = even_batches(count, micro, data) if even else micro_batches(count, micro, data)
    run = run_of(len(micros), data, place)
    return (range(micros[run[0]].start, micros[run[-1]].stop) if run else range(0)), len(run)


def _bytes(settings: RunSettings, outline: nn.Module, blueprint: Blueprint) -> tuple[list[int], list[int], list[int]]:
    """Of every worker: its weights, the gradients of what is trained, the states of the optimizer."""
    parameters = dict(outline.named_parameters())
    weights = {n: ("weight", n, tuple(p.shape), DTYPES[p.dtype]) for n, p in parameters.items()}
    trained = {n: entry for n, entry in weights.items() if parameters[n].requires_grad}
    made = settings.optimizer.build(outline, settings.train.steps).state_dict()["parameters"]
    states = {
        f"{name}/{key}": ("state", name, tuple(parameters[name].shape), DTYPES[tensor.dtype])
        for name, moments in made.items()
        for key, tensor in moments.items()
        if tensor.dim()
    }
    found = []
    whole = replace(blueprint, sharded=False)
    by_step = blueprint.sharded and settings.parallel.gathers_by_step(blueprint.degrees.pipeline)
    for tensors, places in ((weights, blueprint), (trained, whole if by_step else blueprint), (states, blueprint)):
        at = places.layout(tensors).bytes_at() if tensors else {}
        found.append([int(at.get(rank_place(rank), 0)) for rank in range(blueprint.degrees.workers)])
    if by_step:
        gathered = whole.layout(weights).bytes_at()
        found[0] = [kept + int(gathered.get(rank_place(rank), 0)) for rank, kept in enumerate(found[0])]
    return found[0], found[1], found[2]


def _waiting(schedule: Schedule, world: World) -> int:
    """Micro-batches whose gradients of a tied head are kept, each by itself, at a worker."""
    if world.coordinate("pp") != schedule.rank_of[-1]:
        return 0
    return heads_kept(lower(schedule, tied=True)[schedule.rank_of[-1]], schedule.stages - 1)


def _activations(
    settings: RunSettings,
    decoder: Decoder | None,
    cutting: Cutting | None,
    schedule: Schedule | None,
    world: World,
    tokens: int,
) -> tuple[tuple[range, ...], int, int]:
    """A worker's blocks, its micro-batches in flight, and the bytes that these keep at most."""
    if decoder is None:
        return (), 1, 0
    micro = settings.train.micro_batch_size or -(-settings.train.batch_size // world.axis("dp"))
    value_bytes = 2 if settings.precision.compute == "bf16" else 4
    shared = world.axis("cp") * world.axis("tp")  # rows are divided over both; without `sequence` some are not

    def kept(blocks: range) -> int:
        return activation_bytes(decoder.settings, micro, tokens, value_bytes=value_bytes, blocks=blocks) // shared

    if cutting is None or cutting.split is None:
        everything = range(decoder.settings.layers)
        return (everything,), 1, kept(everything)
    pipeline = world.coordinate("pp")
    stages = [stage for stage, rank in enumerate(cutting.rank_of) if rank == pipeline]
    each = {stage: kept(cutting.split.layers_of(stage)) for stage in stages}
    now, peak, flight = Counter[int](), 0, 0
    for action in schedule.actions[pipeline] if schedule is not None else ():
        if action.kind is F:
            now[action.stage] += 1
        elif action.kind is not I:  # halves of backward passes keep what the weights need
            now[action.stage] -= 1
        flight = max(flight, sum(now.values()))
        peak = max(peak, sum(count * each[stage] for stage, count in now.items()))
    return tuple(cutting.split.layers_of(stage) for stage in stages), flight, peak


def _groups(world: World) -> dict[str, list[tuple[int, ...]]]:
    """What groups of more than one worker are for."""
    purposes = {
        "exchange gradients and weights": ("rep", "dp", "cp"),
        "the same, of experts": ("rep", "edp"),
        "hand activations on": ("pp",),
        "divide rows": ("cp",),
        "divide matrices": ("tp",),
        "divide experts": ("ep",),
    }
    if world.axis("ep") == 1:
        del purposes["the same, of experts"]
    found = {purpose: world.members(*axes) for purpose, axes in purposes.items()}
    return {purpose: groups for purpose, groups in found.items() if len(groups[0]) > 1}
