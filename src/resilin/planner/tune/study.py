"""Trying layouts one after another, the likeliest to be best first (Dash et al. 2023, arXiv 2312.12705, section 4).

The first trials are the best of the cost model and some at random; then a proposer chooses, from all that have been
tried. Only layouts that the runtime takes are tried, none twice. A layout that fails counts as the worst that has been
seen, so that its neighbours are avoided too. Whatever is drawn is drawn by the study's seed and the trial's number, and
every trial is written down at once: a study that is interrupted goes on as if it had not been.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from resilin.config import UserError
from resilin.planner.cost import Arrangement
from resilin.planner.tune.features import Candidate, Choice, Hint, Known, candidates, choices, key_of, values
from resilin.planner.tune.propose import Position, Proposal, Proposer, by_trees
from resilin.planner.tune.trial import Outcome, Trial


@dataclass(frozen=True)
class Study:
    """All trials so far.

    Attributes:
        plans: that may be tried, the best of the cost model first.
        trials: in the order in which they ended.
        gain: what the last proposal was expected to gain, as a share of the best rate.
    """

    plans: tuple[Arrangement, ...]
    trials: tuple[Trial, ...]
    gain: float = float("inf")

    @property
    def best(self) -> Trial | None:
        """The quickest that did not fail; None: all failed."""
        return max((trial for trial in self.trials if trial.ran), key=lambda trial: trial.outcome.rate, default=None)

    @property
    def failed(self) -> int:
        """How many failed."""
        return sum(not trial.ran for trial in self.trials)

    def plan_of(self, trial: Trial) -> Arrangement:
        """The layout of a trial."""
        return self._by_key[key_of(trial.choices)]

    @cached_property
    def _by_key(self) -> dict[tuple[Choice, ...], Arrangement]:
        return {key_of(choices(plan)): plan for plan in self.plans}


@dataclass(frozen=True)
class Rules:
    """How a study goes on.

    Attributes:
        seed: of all that is drawn.
        first: how many of the best of the cost model come first.
        drawn: how many at random come next.
        propose: chooses what comes then.
        earlier: trials of other studies, of other models or machines; with hints their ratios compare.
        gain: the study ends when what is left is expected to gain less, as a share of the best rate; 0: it does not.
        at_once: trials that run at the same time.
        most_failures: after so many the study ends.
    """

    seed: int = 0
    first: int = 3
    drawn: int = 3
    propose: Proposer = by_trees
    earlier: Sequence[Trial] = ()
    gain: float = 0.0
    at_once: int = 1
    most_failures: int = 100


def tune(
    plans: Sequence[Arrangement],
    run: Callable[[Arrangement], Outcome],
    trials: int,
    rules: Rules = Rules(),
    *,
    hints: Sequence[Hint] = (),
    file: Path | None = None,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> Study:
    """Tries layouts until so many were, none is left, or the rules say that it is enough.

    Args:
        plans: that may be tried, the best of the cost model first.
        run: tries one; from several threads where several run at once.
        trials: how many, those in the file included.
        rules: how it goes on.
        hints: what the cost model says of each; empty: nothing is known of them beforehand.
        file: trials that were made, a JSON line for each; further ones are added.
        tell: receives every new trial.

    Raises:
        UserError: a package is not installed, or the file is of other layouts.
    """
    known = values(plans, [one.choices for one in rules.earlier])
    pool = candidates(plans, known, hints)
    study = Study(tuple(plans), tuple(_read(file, pool)))
    pending: dict[Future[Outcome], tuple[int, Candidate]] = {}
    with ThreadPoolExecutor(rules.at_once, "trial") as threads:
        while True:
            while len(pending) < rules.at_once and len(study.trials) + len(pending) < min(trials, len(plans)):
                number = len(study.trials) + len(pending)
                proposal = _next(study, pool, known, rules, [one for _, one in pending.values()])
                study = replace(study, gain=proposal.gain)
                if proposal.gain < rules.gain or study.failed >= rules.most_failures:
                    trials = 0  # those under way are the last
                    break
                pending[threads.submit(run, proposal.chosen.plan)] = number, proposal.chosen
            if not pending:
                return study
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda one: pending[one][0]):
                number, chosen = pending.pop(future)
                trial = Trial(number, str(chosen.plan), chosen.choices, future.result(), chosen.hint)
                _write(file, trial)
                study = replace(study, trials=(*study.trials, trial))
                tell(trial)


def _write(file: Path | None, trial: Trial) -> None:
    if file is not None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(trial)) + "\n")


def read_trials(file: Path) -> list[Trial]:
    """The trials that a study has written.

    Raises:
        UserError: a line is none.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
        try:
            tree: dict[str, Any] = json.loads(line)
            hint = Hint(**tree["hint"]) if tree["hint"] else None
            found.append(Trial(tree["number"], tree["layout"], tree["choices"], Outcome(**tree["outcome"]), hint))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}, line {number + 1}: is no trial of a study ({error!r}); remove the line, or use another folder"
            ) from None
    return found


def _read(file: Path | None, pool: Sequence[Candidate]) -> list[Trial]:
    if file is None or not file.exists():
        return []
    possible, found = {one.key: one for one in pool}, []
    for number, trial in enumerate(read_trials(file)):
        chosen = possible.get(key_of(trial.choices))
        if chosen is None:
            raise UserError(f"{file}, line {number + 1}: {trial.layout} is no layout of this study: use another folder")
        found.append(replace(trial, hint=chosen.hint))
    return found


def _next(
    study: Study, pool: Sequence[Candidate], known: Known, rules: Rules, under_way: Sequence[Candidate]
) -> Proposal:
    """The next layout: one of the best, one at random, or what is proposed."""
    tried = {key_of(trial.choices) for trial in study.trials} | {one.key for one in under_way}
    left = [one for one in pool if one.key not in tried]
    number, delay = len(tried), rules.first + rules.drawn
    if number < rules.first:
        return Proposal(left[0])
    if number < delay or not known:
        return Proposal(random.Random(f"{rules.seed} {number}").choice(left))
    return rules.propose(Position(left, study.trials, under_way, known, rules.earlier, number, delay, rules.seed))
