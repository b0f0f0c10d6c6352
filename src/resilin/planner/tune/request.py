"""From what a user asks of `resilin plan tune` to a study."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from resilin.config import UserError
from resilin.parallel.errors import ParallelError
from resilin.planner.cost import Arrangement, Prediction, predict
from resilin.planner.search.find import usable
from resilin.planner.search.request import LayoutRequest, Prepared, device_type, no_layout, prepare, settings_of
from resilin.planner.search.space import arrangements
from resilin.planner.tune.features import hint_of
from resilin.planner.tune.propose import Proposer, by_chance, by_tpe, by_trees
from resilin.planner.tune.study import Rules, Study, read_trials, tune
from resilin.planner.tune.trial import Outcome, Trial
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
        # Trials that run at once have a folder each.
        place = folder / "last" / threading.current_thread().name
        return run_trial(settings, place, asked.work.step_tokens, timeout)

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


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """How a study of a request goes.

    Attributes:
        trials: how many in all.
        steps: of a trial that count.
        timeout: seconds of a trial.
        seed: of the study.
        simulate: try by the cost model, and run nothing.
        first: how many of the cost model's best come first.
        drawn: how many at random come next.
        gain: the study ends when less is expected to be gained, as a share.
        at_once: trials that run at the same time.
        sampler: what proposes: "trees", "tpe" or "chance".
        earlier: folders of other studies, whose trials count.
    """

    trials: int = 12
    steps: int = 4
    timeout: float = 300.0
    seed: int = 0
    simulate: bool = False
    first: int = 3
    drawn: int = 3
    gain: float = 0.01
    at_once: int = 1
    sampler: str = "trees"
    earlier: tuple[Path, ...] = ()


SAMPLERS: dict[str, Proposer] = {"trees": by_trees, "tpe": by_tpe, "chance": by_chance}


def rules_of(options: TuneOptions) -> Rules:
    """A study's rules.

    Raises:
        UserError: there is no such sampler, or a folder holds no study.
    """
    if options.sampler not in SAMPLERS:
        raise UserError(f"--sampler {options.sampler}: should be one of {', '.join(SAMPLERS)}")
    earlier = []
    for folder in options.earlier:
        file = folder / FILE
        if not file.is_file():
            raise UserError(f"--earlier {folder}: holds no {FILE}; name the folder of a study")
        earlier += [trial for trial in read_trials(file) if trial.hint is not None]
    return Rules(
        seed=options.seed,
        first=options.first,
        drawn=options.drawn,
        propose=SAMPLERS[options.sampler],
        earlier=tuple(earlier),
        gain=options.gain,
        at_once=options.at_once,
    )


def study_of(
    request: LayoutRequest,
    folder: Path,
    options: TuneOptions = TuneOptions(),
    tell: Callable[[Trial], None] = lambda trial: None,
) -> tuple[Prepared, Study]:
    """Tunes what a request asks for; goes on with the trials that the folder holds.

    Args:
        request: its tokens are not looked at.
        folder: of the study.
        options: how it goes.
        tell: receives every new trial.

    Raises:
        UserError: naming what cannot be used.
    """
    asked, rules = prepare(request), rules_of(options)
    steps, limit = priced(asked), usable(asked.cluster)
    folder.mkdir(parents=True, exist_ok=True)
    run = simulated(asked, options.seed) if options.simulate else real(asked, folder, options.steps, options.timeout)
    hints = [hint_of(step, limit) for step in steps]
    plans = [step.plan for step in steps]
    return asked, tune(plans, run, options.trials, rules, hints=hints, file=folder / FILE, tell=tell)
