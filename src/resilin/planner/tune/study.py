"""Trying layouts one after another, the likeliest to be best first (Dash et al. 2023, arXiv 2312.12705, section 4).

The first trials are the best of the cost model and some at random; then optuna's TPE proposes, from all that have been
tried, and of its proposals that one is taken whose like did best. Only layouts that the runtime takes are tried, none
twice. A layout that fails counts as the worst that has been seen, so that its neighbours are avoided too. Every trial
has a sampler of its own seed and is written down at once: a study that is interrupted goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from resilin.config import UserError
from resilin.planner.cost import Arrangement
from resilin.planner.tune.features import choices, values

Status = Literal["ok", "oom", "crash", "timeout"]
_ASKS = 64
"""Proposals of the sampler for one trial, many of which are impossible, or known."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial went.

    Attributes:
        status: ok, or why it failed.
        rate: tokens a second; 0 where it failed.
        reason: of a failure, in words.
    """

    status: Status
    rate: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """A layout that was tried.

    Attributes:
        number: from 0.
        layout: in words.
        choices: see `features`.
        outcome: how it went.
    """

    number: int
    layout: str
    choices: dict[str, Any]
    outcome: Outcome


@dataclass(frozen=True)
class Study:
    """All trials so far.

    Attributes:
        plans: that may be tried, the best of the cost model first.
        trials: in order.
    """

    plans: tuple[Arrangement, ...]
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial | None:
        """The quickest that did not fail; None: all failed."""
        good = [trial for trial in self.trials if trial.outcome.status == "ok"]
        return max(good, key=lambda trial: trial.outcome.rate, default=None)

    def plan_of(self, trial: Trial) -> Arrangement:
        """The layout of a trial."""
        return next(plan for plan in self.plans if choices(plan) == trial.choices)


def tune(
    plans: Sequence[Arrangement],
    run: Callable[[Arrangement], Outcome],
    trials: int,
    *,
    seed: int = 0,
    first: int = 3,
    drawn: int = 3,
    file: Path | None = None,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> Study:
    """Tries layouts until so many were, or none is left.

    Args:
        plans: that may be tried, the best of the cost model first.
        run: tries one.
        trials: how many, those in the file included.
        seed: of all that is drawn.
        first: how many of the best of the cost model come first.
        drawn: how many at random come next.
        file: trials that were made, a JSON line for each; further ones are added.
        tell: receives every new trial.

    Raises:
        UserError: optuna is not installed, or the file is of other layouts.
    """
    study = Study(tuple(plans), tuple(_read(file, plans)))
    known = values(plans)
    while len(study.trials) < min(trials, len(study.plans)):
        number = len(study.trials)
        plan = _next(study, known, random.Random(f"{seed} {number}"), first, drawn)
        trial = Trial(number, str(plan), choices(plan), run(plan))
        if file is not None:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(trial)) + "\n")
        study = replace(study, trials=(*study.trials, trial))
        tell(trial)
    return study


def _read(file: Path | None, plans: Sequence[Arrangement]) -> list[Trial]:
    if file is None or not file.exists():
        return []
    possible, found = [choices(plan) for plan in plans], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
        tree = json.loads(line)
        if tree["choices"] not in possible:
            raise UserError(
                f"{file}, line {number + 1}: {tree['layout']} is no layout of this study: use another folder"
            )
        found.append(Trial(tree["number"], tree["layout"], tree["choices"], Outcome(**tree["outcome"])))
    return found


def _next(study: Study, known: dict[str, list[Any]], chance: random.Random, first: int, drawn: int) -> Arrangement:
    """The next layout: one of the best, one at random, or what the sampler proposes."""
    tried = [trial.choices for trial in study.trials]
    left = [plan for plan in study.plans if choices(plan) not in tried]
    number = len(tried)
    if number < first:
        return left[0]
    if number < first + drawn or not known:
        return chance.choice(left)
    return _proposed(study, known, left, chance.randrange(2**31))


def _proposed(study: Study, known: dict[str, list[Any]], left: list[Arrangement], seed: int) -> Arrangement:
    try:
        import optuna
    except ImportError:
        raise UserError("tuning needs optuna: pip install 'resilin[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, Any] = {
        name: optuna.distributions.CategoricalDistribution(each) for name, each in known.items()
    }
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, multivariate=True)
    asked = optuna.create_study(direction="maximize", sampler=sampler)
    good = [trial.outcome.rate for trial in study.trials if trial.outcome.status == "ok"]
    worst = min(good, default=0.0)
    for trial in study.trials:
        value = trial.outcome.rate if trial.outcome.status == "ok" else worst
        chosen = {name: trial.choices[name] for name in known}
        asked.add_trial(optuna.trial.create_trial(params=chosen, distributions=distributions, value=value))
    by_choice = {tuple(choices(plan)[name] for name in known): plan for plan in left}
    proposed = {}
    for _ in range(_ASKS):
        wanted = asked.ask(distributions).params
        key = tuple(wanted[name] for name in known)
        if key in by_choice:
            proposed[key] = by_choice[key]
    # Of what the sampler proposes and can be (of all that is left, where nothing can), the one whose like did best.
    return max((proposed or by_choice).values(), key=lambda plan: _like(plan, study))


def _like(plan: Arrangement, study: Study) -> float:
    """The mean rate of what was tried, those that are alike counting most; failures count as no rate."""
    own, total, weights = choices(plan), 0.0, 0.0
    for trial in study.trials:
        apart = sum(_apart(own[name], value) for name, value in trial.choices.items())
        weights += 4.0**-apart
        total += 4.0**-apart * trial.outcome.rate
    return total / weights


def _apart(one: int | str, other: int | str) -> float:
    """How far two values of a choice are: degrees and rows by their doublings, names by whether they differ."""
    if isinstance(one, int) and isinstance(other, int):
        return abs(math.log2(one / other))
    return float(one != other)
