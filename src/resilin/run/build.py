"""From settings to a run that is ready to take its first, or next, step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from resilin.checkpoint.background import BackgroundSaves
from resilin.checkpoint.folder import CheckpointFolder
from resilin.cluster.join import agree_on, lead_first
from resilin.cluster.view_world import ViewWorld
from resilin.config import UserError
from resilin.data.settings import SourceContext
from resilin.memory.tiered_optimizer import tiered_optimizer
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.models.step_flops import step_flops_per_token
from resilin.nouns import Objective, Optimizer, Source
from resilin.objective.settings import ObjectiveContext
from resilin.parallel.state import StateLayout
from resilin.parallel.workers import Workers
from resilin.parallel.world import World
from resilin.precision.autocast import Precision, choose_precision
from resilin.precision.compiled import compile_model
from resilin.run.allocator import keep_freed_memory
from resilin.run.device import choose_device, device_in_words, set_threads
from resilin.run.divided import Divided, coordinator, divide, initial_values, starts_as_outline
from resilin.run.elastic import Elastic
from resilin.run.elastic_place import first_place, starts_as_stage
from resilin.run.events import Listener, RunStarted
from resilin.run.folder import RunFolder
from resilin.run.run import Pace, Run
from resilin.run.settings import RunSettings


@dataclass(frozen=True, slots=True)
class Sources:
    """The data a run reads."""

    source: Source
    validation: dict[str, Source]


def build_sources(settings: RunSettings, *, validation: bool = True, folder: RunFolder | None = None) -> Sources:
    """The training data of these settings and, where the run evaluates, the held-out data."""
    train, path = settings.train, folder.path if folder is not None else None
    source = settings.source.build(SourceContext(settings.seed, "train", train.batch_size, path))
    held_out: dict[str, Source] = {}
    if validation and (settings.evaluation.every or settings.evaluation.at_start):
        context = SourceContext(settings.seed, "validation", train.batch_size)
        held_out["validation"] = settings.source.build(context)
        held_out |= {name: more.build(context) for name, more in settings.evaluation.held_out.items()}
        _check_tokenizers(source, held_out)
    return Sources(source, held_out)


def facts_of(source: Source) -> dict[str, Any]:
    """What tells two sources apart, as JSON values: workers that read different files must not train together."""
    shards = getattr(getattr(source, "stream", None), "shards", None)
    facts: dict[str, Any] = {}
    for name, holder in (("digest", source), ("digest of its tokens", shards)):
        digest = getattr(holder, "digest", None)
        if isinstance(digest, str):
            facts[name] = digest
    facts["digest of its tokenizer"] = getattr(getattr(source, "tokenizer", None), "digest", None)
    with suppress(TypeError):  # it does not end
        facts["batches"] = len(source)  # type: ignore[arg-type]
    return facts


def _check_tokenizers(source: Source, held_out: dict[str, Source]) -> None:
    """Refuse held-out data whose tokens are others than those the model learns.

    Raises:
        UserError: naming it.
    """
    mine = getattr(getattr(source, "tokenizer", None), "digest", None)
    for name, other in held_out.items():
        theirs = getattr(getattr(other, "tokenizer", None), "digest", None)
        if mine is not None and theirs is not None and mine != theirs:
            raise UserError(
                f"evaluation.held_out.{name}: its tokenizer is another than that of [source], so its losses would mean "
                "nothing: give it the same one"
            )


def steps_of(settings: RunSettings, source: Source) -> int:
    """Steps that the run takes: those asked for, or as many as the source has, where these are fewer.

    Raises:
        UserError: all steps of a source that does not end were asked for.
    """
    asked = settings.train.steps
    try:
        there = len(source)  # type: ignore[arg-type]
    except TypeError:
        if not asked:
            raise UserError(
                "train.steps = 0 takes as many steps as the source has, and this one does not end: set train.steps, or "
                "source.epochs"
            ) from None
        return asked
    ends = (not asked or there < asked) and source.slots(there) == 0
    return there if ends else asked


def pace_of(settings: RunSettings) -> Pace:
    """The loop's share of the settings."""
    train, evaluation = settings.train, settings.evaluation
    return Pace(
        steps=train.steps,
        micro_batch_size=train.micro_batch_size,
        clip_norm=train.clip_norm,
        non_finite=train.non_finite,
        non_finite_cap=train.non_finite_cap,
        save_every=settings.checkpoint.every,
        evaluate_every=evaluation.every,
        evaluate_batches=evaluation.batches,
        evaluate_at_start=evaluation.at_start,
        log_every=settings.log.every,
        asynchronous=settings.checkpoint.asynchronous,
    )


def objective_context(
    settings: RunSettings, source: Source, device: torch.device, folder: RunFolder | None = None
) -> ObjectiveContext:
    """What the objective of these settings may ask of its run."""

    def initial_model() -> nn.Module:
        context = ModelContext(settings.seed, getattr(source, "vocab_size", None))
        return settings.model.build(context).to(device).eval().requires_grad_(False)

    path = folder.path if folder is not None else None
    return ObjectiveContext(settings.seed, device, source, initial_model, path, settings.train.steps)


def flops_per_unit(model: nn.Module, source: Source) -> float | None:
    """Forward and backward FLOPs of one token, where model and source are such that this is known."""
    length = getattr(source, "sequence_length", None)
    if isinstance(model, Decoder) and length is not None:
        return step_flops_per_token(model, length)
    return None


def model_of(settings: RunSettings, source: Source, device: torch.device, *, outline: bool) -> nn.Module:
    """The whole model, or its outline where a worker draws only its part."""
    context = ModelContext(settings.seed, getattr(source, "vocab_size", None))
    if outline:
        found = settings.model.outline(context)
        if found is not None:
            return found
    return settings.model.build(context).to(device)


def store_of(settings: RunSettings, folder: RunFolder, world: World | None) -> CheckpointFolder:
    """Where the run saves; all workers call together."""
    keep = settings.checkpoint
    together = world.saving() if isinstance(world, ViewWorld) else None if world is None else coordinator(world)
    return CheckpointFolder(
        folder.checkpoints_of(settings),
        keep.keep_last,
        keep.keep_every,
        coordinator=together,
        second_copy=keep.second_copy,
    )


def build_run(
    settings: RunSettings,
    folder: RunFolder | None = None,
    listeners: Sequence[Listener] = (),
    world: World | None = None,
    elastic: Elastic | None = None,
) -> Run:
    """A run of these settings; with a folder, it saves there.

    Args:
        settings: of the run.
        folder: the run's.
        listeners: told of every event.
        world: all workers, who call together; None: this process is the only one, or one of those that come and go.
        elastic: gives this worker its place among those that come and go.

    Raises:
        SettingsError, DataError, ...: naming what does not fit, before anything is computed.
    """
    device = choose_device(settings.train.device)
    set_threads(settings.train.threads)
    if device.type == "cpu":
        keep_freed_memory()
    with lead_first(world) if elastic is None else elastic.in_turn():  # what it prepares, the others find
        sources = build_sources(settings, folder=folder)
    if world is not None:
        agree_on("data", facts_of(sources.source), world.everyone)
    tree: dict[str, Any] = settings.model_dump(mode="json")
    steps = steps_of(settings, sources.source)
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": steps})})
    small = starts_as_stage(settings) if world is None else starts_as_outline(settings, world)
    lent = settings.memory.experts is not None and type(settings.model) is DecoderSettings  # the whole may be too large
    outline = lent if elastic is None and world is None else small
    model = model_of(settings, sources.source, device, outline=outline)
    parameters, flops = sum(p.numel() for p in model.parameters()), flops_per_unit(model, sources.source)
    precision = choose_precision(settings.precision, device)
    context = objective_context(settings, sources.source, device, folder)
    objective = settings.objective.build(context)
    share = _share_of(settings, model, objective, sources.source, folder, world, elastic, device, precision)
    world = elastic.world if elastic is not None else world
    unit = getattr(objective, "unit", "tokens")
    store, saves, pace = None, None, pace_of(settings)
    if folder is None:
        pace = replace(pace, save_every=0)
    else:
        store = store_of(settings, folder, world) if elastic is None else None  # made with the others, once they are
        saves = BackgroundSaves(store) if store is not None and settings.checkpoint.asynchronous else None
    where = f"{device_in_words(device)}, {precision.compute}"
    if world is not None and share.engine is not None:
        where += f", {world}, {'exact' if share.engine.exact else 'fast'} sums"
    started = RunStarted(
        folder=str(folder.path) if folder is not None else "",
        settings=tree,
        parameters=parameters,
        device=where,
        start_step=0,
        total_steps=settings.train.steps,
        unit=unit,
        flops_per_unit=flops if unit == "tokens" else None,
        peak_flops=precision.peak_flops,
    )
    return Run(
        source=sources.source,
        model=share.model,
        objective=objective,
        optimizer=share.optimizer,
        pace=pace,
        seed=settings.seed,
        device=device,
        autocast=precision.autocast,
        checkpoints=store,
        saves=saves,
        validation=sources.validation,
        listeners=listeners,
        started=started,
        computed_model=share.computed,
        workers=share.engine,
        layout=share.layout,
        elastic=elastic,
    )


@dataclass(frozen=True)
class _Share:
    """What of a run this process has.

    Attributes:
        model: or its part of it.
        optimizer: of what it updates.
        computed: what the objective calls, if that is not the model and no engine knows it.
        engine: computes steps with others.
        layout: of the state of all workers.
    """

    model: nn.Module
    optimizer: Optimizer
    computed: nn.Module | None = None
    engine: Workers | None = None
    layout: StateLayout | None = None

    @classmethod
    def of(cls, divided: Divided) -> _Share:
        """One of many workers'."""
        return cls(divided.model, divided.optimizer, None, divided.engine, divided.layout)


def _optimizer_of(settings: RunSettings, model: nn.Module, folder: RunFolder | None, device: torch.device) -> Optimizer:
    """Of a model that this process has alone; what of it is to live elsewhere is out of the model afterwards."""
    tiers = settings.memory.experts
    if tiers is None:
        return settings.optimizer.build(model, settings.train.steps)
    return tiered_optimizer(
        tiers,
        settings.optimizer,
        model,
        settings.train.steps,
        run_folder=folder.path if folder is not None else None,
        values=initial_values(settings, model),
        device=device,
    )


def _share_of(
    settings: RunSettings,
    model: nn.Module,
    objective: Objective,
    source: Source,
    folder: RunFolder | None,
    world: World | None,
    elastic: Elastic | None,
    device: torch.device,
    precision: Precision,
) -> _Share:
    """This process's share of the work; see `build_run`."""
    what, mode = settings.precision.compile, settings.precision.compile_mode
    compiled = partial(compile_model, what=what, mode=mode)
    if elastic is not None:
        placed = first_place(
            elastic,
            settings,
            model,
            objective,
            source,
            compiled,
            partial(compile_model, what=bool(what) and "blocks", mode=mode),
            store=None if folder is None else partial(store_of, settings, folder),
            device=device,
            precision=precision,
        )
        return _Share.of(placed)
    if world is None:
        return _Share(model, _optimizer_of(settings, model, folder, device), compiled(model))
    divided = divide(
        settings,
        world,
        model,
        objective,
        source,
        compiled,
        device=device,
        precision=precision,
        folder=folder.path if folder is not None else None,
    )
    return _Share.of(divided)
