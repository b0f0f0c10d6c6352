"""Layouts that were really run on this machine: all of them, and what a tuner finds with half of the runs."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass
from typing import Any

from resilin.config import parse_settings
from resilin.models.decoder_settings import DecoderSettings
from resilin.parallel.settings import ParallelSettings
from resilin.planner.cost import Arrangement, Workload, predict
from resilin.planner.hardware import load_cluster
from resilin.planner.search.find import usable
from resilin.planner.tune import Outcome, Rules, by_chance, tune
from resilin.planner.tune.features import hint_of
from resilin.planner.tune.sensitivity import Influence, sensitivity
from resilin.recipes.findings import Study, Trial

FIRST = 5  # steps that are not timed
MACHINE = "laptop"
DEFAULT = "data_2"
"""What one would take without looking: plain data parallelism on all cores, the whole share of a worker at once."""


@dataclass(frozen=True)
class Measured:
    """Real runs of one preset.

    Attributes:
        plans: by arm.
        work: model and steps.
        rates: tokens a second by arm and seed.
    """

    plans: dict[str, Arrangement]
    work: Workload
    rates: dict[str, dict[int, float]]

    @property
    def middle(self) -> dict[str, float]:
        """By arm, the median over seeds."""
        return {arm: statistics.median(each.values()) for arm, each in self.rates.items()}

    @property
    def seeds(self) -> list[int]:
        """That all arms have."""
        return sorted(set.intersection(*(set(each) for each in self.rates.values()))) if self.rates else []


def _plan(settings: dict[str, Any]) -> Arrangement:
    given = dict(settings["model"]["stretches"][0]["parallel"])
    given.pop("workers", None)
    return Arrangement(
        ParallelSettings.model_validate({"data": 1, **given}),
        settings["train"]["micro_batch_size"] or settings["train"]["batch_size"],
        settings["model"]["recompute"],
        settings["precision"]["compute"],
    )


def _work(settings: dict[str, Any]) -> Workload:
    names = DecoderSettings.model_fields
    tree = {name: value for name, value in settings["model"].items() if name in names}
    model = parse_settings(DecoderSettings, {**tree, "vocab_size": tree.get("vocab_size") or 256}, "[model]")
    return Workload(model, settings["source"]["sequence_length"], settings["train"]["batch_size"])


def _rate(trial: Trial, tokens: int) -> float | None:
    taken = [value for step, value in trial.record.series.get("seconds", ()) if value is not None and step > FIRST]
    return tokens / statistics.median(taken) if taken else None


def measured(study: Study) -> Measured | None:
    """What the records hold; None: none of them was timed."""
    plans: dict[str, Arrangement] = {}
    rates: dict[str, dict[int, float]] = {}
    work: Workload | None = None
    for trial in study.trials:
        settings = trial.record.settings
        if not settings.get("model", {}).get("stretches"):
            continue
        one = _work(settings)
        found = _rate(trial, one.step_tokens)
        if found is not None:
            work = work or one
            plans[trial.arm] = _plan(settings)
            rates.setdefault(trial.arm, {})[trial.seed] = found
    return Measured(plans, work, rates) if work is not None else None


@dataclass(frozen=True)
class Picked:
    """What a search of half of the runs took.

    Attributes:
        arm: the layout.
        short: what is missing to the best of all, as a share.
        runs: how many it made.
    """

    arm: str
    short: float
    runs: int


def picked(found: Measured, seed: int, chance: bool = False) -> Picked:
    """One search over what was measured with a seed, judged by the medians over seeds.

    Args:
        found: everything.
        seed: whose measurements the search sees.
        chance: whether it draws instead of choosing.
    """
    study, arms = _searched(found, seed, len(found.plans) // 2, chance)
    assert study.best is not None
    arm = arms[id(study.plan_of(study.best))]
    return Picked(arm, short(found, arm), len(study.trials))


def short(found: Measured, arm: str) -> float:
    """What is missing of an arm's rate to the best, as a share."""
    middle = found.middle
    return 1 - middle[arm] / max(middle.values())


def influence(found: Measured) -> dict[str, Influence]:
    """What each choice did, over all that was measured."""
    study, _ = _searched(found, found.seeds[0], len(found.plans), True, found.middle)
    return sensitivity(study)


def _searched(
    found: Measured, seed: int, budget: int, chance: bool, rates: dict[str, float] | None = None
) -> tuple[Any, dict[int, str]]:
    cluster = load_cluster(MACHINE)
    cores = 2 if cluster.workers > 2 else None
    steps = {
        arm: predict(found.work, plan, cluster, device_type="cpu", cores=cores) for arm, plan in found.plans.items()
    }
    order = sorted(steps, key=lambda arm: steps[arm].seconds)
    if chance:
        random.Random(seed).shuffle(order)
    arms = {id(found.plans[arm]): arm for arm in order}
    hints = [hint_of(steps[arm], usable(cluster)) for arm in order]

    def run(plan: Arrangement) -> Outcome:
        arm = arms[id(plan)]
        value = rates[arm] if rates else found.rates[arm].get(seed, math.nan)
        return Outcome("ok", value) if value > 0 else Outcome("crash", reason="was not measured")

    rules = Rules(seed=seed, first=0 if chance else 2, drawn=budget if chance else 1, propose=by_chance)
    if not chance:
        rules = Rules(seed=seed, first=2, drawn=1)
    return tune([found.plans[arm] for arm in order], run, budget, rules, hints=() if chance else hints), arms
