"""The stages that settings make of a decoder, and the order of work in the pipeline that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resilin.models.decoder import Decoder
from resilin.models.flops import block_flops_per_token, head_flops_per_token
from resilin.parallel.errors import ParallelError
from resilin.parallel.pipeline.build import METHODS, build
from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.messages import Op, lower
from resilin.parallel.pipeline.schedule import I, Schedule, loop, vee
from resilin.parallel.pipeline.split import Split, balanced
from resilin.parallel.pipeline.validate import validate
from resilin.parallel.settings import ParallelSettings
from resilin.parallel.world import World


def stages_of(settings: ParallelSettings, world: World, decoder: Decoder, tokens: int) -> tuple[Split, tuple[int, ...]]:
    """The blocks of every stage of a pipeline, and the rank of each stage.

    Args:
        settings: of the run.
        world: all workers.
        decoder: whole.
        tokens: of a row, for the costs of attention.

    Raises:
        ParallelError: the blocks cannot be divided so.
    """
    ranks, model = world.axis("pp"), decoder.settings
    stages = ranks * settings.chunks
    if settings.schedule.endswith(".csv"):
        schedule = schedule_named(settings.schedule, 0, ranks, 1)
        stages, rank_of = schedule.stages, schedule.rank_of
    elif settings.schedule == "zb-v":
        stages, rank_of = 2 * ranks, vee(2 * ranks, ranks)
    else:
        rank_of = loop(stages, ranks)
    if settings.sharding == "fsdp" and decoder.head is None and rank_of[0] == rank_of[-1]:
        raise ParallelError(
            f"parallel.schedule = {settings.schedule!r} has the first and the last stage at one worker, and with tied "
            "embeddings sharding = 'fsdp' would divide their weight twice: use another schedule, or sharding = 'zero1'"
        )
    if stages > model.layers:
        raise ParallelError(
            f"{model.layers} block{'s' if model.layers > 1 else ''} cannot be divided over {stages} stages "
            f"(parallel.pipeline {ranks} * chunks {stages // ranks}): every stage needs one"
        )
    try:
        if settings.layers:
            bounds = [0]
            for count in settings.layers:
                bounds.append(bounds[-1] + count)
            split = Split(tuple(bounds))
        else:
            costs = [block_flops_per_token(model, layer, tokens) for layer in range(model.layers)]
            split = balanced(costs, stages, 0.0, head_flops_per_token(model), allowed=lambda _, first, end: end > first)
    except ScheduleError as error:
        raise ParallelError(f"{model.layers} blocks cannot be divided over {stages} stages: {error}") from None
    if split.stages != stages or split.layers != model.layers:
        raise ParallelError(
            f"parallel.layers names {split.stages} stages with {split.layers} blocks together; the pipeline has "
            f"{stages} and the model {model.layers}"
        )
    return split, rank_of


def schedule_named(name: str, stages: int, ranks: int, micros: int) -> Schedule:
    """A schedule by name, or out of a file; checked.

    Args:
        name: see `ParallelSettings.schedule`.
        stages: of the model.
        ranks: of the pipeline.
        micros: micro-batches.

    Raises:
        ParallelError: there is none.
    """
    if name.endswith(".csv"):
        schedule = _read(name)
        if schedule.ranks != ranks:
            raise ParallelError(
                f"parallel.schedule: {name} is for {schedule.ranks} ranks, and the pipeline has {ranks}"
            )
        return schedule
    try:
        return build(name, stages, ranks, micros)
    except ScheduleError as error:
        raise ParallelError(f"parallel.schedule: {error}") from None


def _read(name: str) -> Schedule:
    """Out of a file; checked."""
    try:
        schedule = Schedule.parse(Path(name).read_text(encoding="utf-8"), name)
        validate(schedule)
    except ScheduleError as error:
        raise ParallelError(f"parallel.schedule: {error}") from None
    except OSError as error:
        raise ParallelError(f"parallel.schedule: {name}: {error.strerror}") from None
    return schedule


def splits_backward(schedule: str) -> bool:
    """Whether a schedule, by name or out of a file, cuts backward passes in halves.

    Raises:
        ParallelError: it cannot be read.
    """
    if schedule.endswith(".csv"):
        return any(action.kind is I for row in _read(schedule).actions for action in row)
    return schedule in METHODS and METHODS[schedule].split


def ops_of(settings: ParallelSettings, stages: int, ranks: int, rank: int, tied: bool, micros: int) -> Sequence[Op]:
    """What a rank of a pipeline does, operation by operation.

    Args:
        settings: of the run.
        stages: of the model.
        ranks: of the pipeline.
        rank: which of them.
        tied: see `lower`.
        micros: micro-batches of a data worker.

    Raises:
        ParallelError: the schedule is for other numbers.
    """
    schedule = schedule_named(settings.schedule, stages, ranks, micros)
    if schedule.micros != micros:
        raise ParallelError(
            f"parallel.schedule: {settings.schedule} is for {schedule.micros} micro-batches, and a worker has "
            f"{micros}: set train.micro_batch_size"
        )
    return lower(schedule, tied=tied)[rank]
