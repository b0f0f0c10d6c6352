"""Measuring what a training step costs at three sizes of a family, for plans under a wall-clock budget."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from resilin.keys import Keys
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.parallel.step import gradient_of_step
from resilin.planner.budget import StepTimes
from resilin.planner.family import Architecture, Family
from resilin.precision.autocast import choose_precision
from resilin.run.device import choose_device, set_threads
from resilin.run.settings import RunSettings

SIZES = 3
WARM_STEPS, TIMED_STEPS = 2, 5


def step_seconds(settings: RunSettings, sequence_length: int, vocab_size: int) -> float:
    """The median time of a training step (forward, backward, clipping, update) on random tokens.

    Args:
        settings: of a run; its model, objective, optimizer, batch, precision and device are used, not its source.
        sequence_length: T of a row.
        vocab_size: ids are drawn below it.
    """
    device = choose_device(settings.train.device)
    set_threads(settings.train.threads)
    model = settings.model.build(ModelContext(settings.seed, vocab_size)).to(device).train()
    objective = settings.objective.build(None)
    optimizer = settings.optimizer.build(model, 10 * (WARM_STEPS + TIMED_STEPS))
    autocast = choose_precision(settings.precision, device).autocast
    size = settings.train.batch_size
    drawn_BT = torch.randint(vocab_size, (size, sequence_length + 1), generator=torch.Generator().manual_seed(0))
    fields = {"tokens": drawn_BT[:, :-1].contiguous(), "labels": drawn_BT[:, 1:].contiguous()}
    batch = Batch(torch.arange(size), fields)
    times = []
    for step in range(WARM_STEPS + TIMED_STEPS):
        began = time.perf_counter()
        optimizer.zero_grad()
        gradient_of_step(
            model,
            objective,
            batch,
            Keys(settings.seed, step, batch.slots_B),
            micro_batch_size=settings.train.micro_batch_size or size,
            clip_norm=settings.train.clip_norm,
            device=device,
            autocast=autocast,
        )
        optimizer.step(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_STEPS:])


def _spread(family: Family, center: float) -> list[Architecture]:
    """Three members around a size: below, at, and above it, where there are any."""
    middle = family.members.index(family.nearest(center))
    last = len(family.members) - 1
    places = sorted({max(0, middle - 2), middle, min(last, middle + 2)})
    while len(places) < SIZES and places[-1] < last:
        places.append(places[-1] + 1)
    return [family.members[place] for place in places]


def measure_step_times(
    settings: RunSettings,
    family: Family,
    sequence_length: int,
    center: float,
    tell: Callable[[str], None],
) -> StepTimes:
    """Seconds of a step at three members of the family around a size.

    Args:
        settings: of a run, whose model is replaced by the members.
        family: to take members from.
        sequence_length: T of a row.
        center: P, near what the plan will choose.
        tell: receives a line for each measured size.
    """
    found = []
    for member in _spread(family, center):
        seconds = step_seconds(
            settings.model_copy(update={"model": member.settings}), sequence_length, member.settings.vocab_size
        )
        tell(f"measured {member.shape()}: {member.parameters:,} parameters, {seconds * 1e3:.1f} ms a step")
        found.append((float(member.parameters), seconds))
    return StepTimes(tuple(found))
