"""From what a user asks of `resilin plan tune` to a study."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from resilin.parallel.errors import ParallelError
from resilin.planner.cost import Arrangement, Prediction, predict
from resilin.planner.search.find import usable
from resilin.planner.search.request import LayoutRequest, Prepared, device_type, no_layout, prepare, settings_of
from resilin.planner.search.space import arrangements
from resilin.planner.tune.study import Outcome, Study, Trial, tune
from resilin.planner.tune.trial_run import WARM_UP, run_trial

FILE = "trials.jsonl"
NOISE = 0.02
"""Of simulated trials: the share by which one differs from the next."""


def priced(asked: Prepared) -> list[Prediction]:
    """Every layout of a request, the quickest by the cost model first; what is too large by it comes last.

    Raises:
        UserError: there is none.
    """
    kind, found = device_type(asked.cluster), []
    cores = asked.cluster.workers if kind == "cpu" and 0 < asked.cluster.workers < asked.workers else None
    for plan in arrangements(asked.work, asked.cluster, asked.workers, asked.fixed):
        try:
            found.append(predict(asked.work, plan, asked.cluster, device_type=kind, cores=cores, exact=False))
        except ParallelError:
            continue
    if not found:
        raise no_layout(asked.work, asked.workers)
    limit = usable(asked.cluster)
    return sorted(found, key=lambda step: (step.memory.total > limit, step.seconds))


def predicted_of(asked: Prepared, plan: Arrangement) -> Prediction:
    """A layout's prediction."""
    return predict(asked.work, plan, asked.cluster, device_type=device_type(asked.cluster), exact=False)


def real(asked: Prepared, folder: Path, steps: int, timeout: float) -> Callable[[Arrangement], Outcome]:
    """A trial by a short run of so many steps, in a folder of its own."""
    tokens = float((steps + WARM_UP) * asked.work.step_tokens)

    def run(plan: Arrangement) -> Outcome:
        settings = settings_of(asked, predicted_of(asked, plan), tokens)
        return run_trial(settings, folder / "last", asked.work.step_tokens, timeout)

    return run


def simulated(asked: Prepared, seed: int) -> Callable[[Arrangement], Outcome]:
    """A trial by the cost model, with 2% of noise; what does not fit fails."""
    limit = usable(asked.cluster)

    def run(plan: Arrangement) -> Outcome:
        step = predict(asked.work, plan, asked.cluster, device_type=device_type(asked.cluster))
        if step.memory.total > limit:
            return Outcome("oom", reason=f"{step.memory.total / 1e9:.3g} GB of {limit / 1e9:.3g}")
        noise = random.Random(f"{seed} {plan}").gauss(1.0, NOISE)
        return Outcome("ok", step.tokens_per_second * noise)

    return run


def study_of(
    request: LayoutRequest,
    folder: Path,
    trials: int,
    *,
    steps: int = 4,
    timeout: float = 300.0,
    seed: int = 0,
    simulate: bool = False,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> tuple[Prepared, Study]:
    """Tunes what a request asks for; goes on with the trials that the folder holds.

    Args:
        request: its tokens are not looked at.
        folder: of the study.
        trials: how many in all.
        steps: of a trial that count.
        timeout: seconds of a trial.
        seed: of the study.
        simulate: try by the cost model, and run nothing.
        tell: receives every new trial.

    Raises:
        UserError: naming what cannot be used.
    """
    asked = prepare(request)
    steps_found = priced(asked)
    folder.mkdir(parents=True, exist_ok=True)
    run = simulated(asked, seed) if simulate else real(asked, folder, steps, timeout)
    plans = [step.plan for step in steps_found]
    return asked, tune(plans, run, trials, seed=seed, file=folder / FILE, tell=tell)
