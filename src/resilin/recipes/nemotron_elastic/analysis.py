"""The analysis of the recipe: sub-models of an elastic model beside cuts of its parent, by seeds."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, Study, Table, Trial
from resilin.recipes.gains import share_claim
from resilin.recipes.nemotron_elastic.runs import MEASURED

TITLES = {
    "elastic": "elastic, ordered by activations",
    "random": "elastic, in random order",
}
UNIT = "nat/token"
RANDOM_WORSE, EXCESS, WHOLE, NEAR = 1.2, 2.0, 1.02, 0.02
"""Least divergence of a random order, times that of the ranking; least excess loss of a cut, times that of training;
most loss of the whole, times the parent's; most distance of a cost from its target, as a share of it."""


@dataclass(frozen=True, slots=True)
class _Arm:
    """One way of training over the seeds."""

    name: str
    trials: tuple[Trial, ...]

    def values(self, name: str) -> list[float]:
        """A measure of each seed; what is missing is no number."""
        found = [trial.record.final.get(f"{MEASURED}/{name}") for trial in self.trials]
        return [math.nan if value is None else value for value in found]

    def row(self, title: str, name: str, unit: str = UNIT) -> Row:
        """Its mean and spread."""
        return Row.over_seeds(f"{title}, {TITLES[self.name]}", self.values(name), unit)

    @property
    def targets(self) -> tuple[str, ...]:
        """The sub-models, ascending; the last is the whole."""
        start = f"{MEASURED}/trained/"
        names = {key.split("/")[2] for key in self.trials[0].record.final if key.startswith(start)}
        return tuple(sorted(names - {"parent"}, key=float))


def _arm(study: Study, name: str) -> _Arm | None:
    trials = study.select(arm=name)
    done = tuple(trial for trial in trials if trial.record.status == "finished" and trial.record.evaluations)
    if not done or len(done) < len(trials) or not any(key.startswith(f"{MEASURED}/") for key in done[0].record.final):
        return None
    return _Arm(name, done)


def _claim(name: str, statement: str, shares: list[float], most: float, words: str = "") -> Claim:
    return share_claim(name, statement, shares, most, words, digits=3)


def _shares(mine: list[float], theirs: list[float]) -> list[float]:
    return [one / other if other else math.nan for one, other in zip(mine, theirs, strict=True)]


def _claims(arms: dict[str, _Arm]) -> list[Claim]:
    mine = arms.get("elastic")
    if mine is None:
        return []
    *parts, whole = mine.targets
    smallest = parts[0]
    found = [
        _claim(
            "ranking",
            f"cut out without training, the {smallest} sub-model diverges from its parent at least "
            f"{RANDOM_WORSE - 1:.0%} more in random order",
            _shares(mine.values(f"activation/{smallest}/kl"), mine.values(f"random/{smallest}/kl")),
            1 / RANDOM_WORSE,
            " of it in order",
        )
    ]
    parent = mine.values("trained/parent/loss")
    for target in parts:
        cut = [a - b for a, b in zip(mine.values(f"activation/{target}/loss"), parent, strict=True)]
        trained = [a - b for a, b in zip(mine.values(f"trained/{target}/loss"), parent, strict=True)]
        found.append(
            _claim(
                f"training, {target}",
                f"cut out without training, the {target} sub-model's loss is at least {EXCESS:g} times as far above "
                "the parent's",
                _shares(trained, cut),
                1 / EXCESS,
                " of the excess is left",
            )
        )
        gaps = [abs(cost - float(target)) / float(target) for cost in mine.values(f"trained/{target}/cost")]
        found.append(
            _claim(
                f"router, {target}",
                f"the cost of what the router chose is within {NEAR:.0%} of the target {target}",
                gaps,
                NEAR,
                " of it away",
            )
        )
    found.append(
        _claim(
            "whole",
            f"the whole model's loss is at most {WHOLE - 1:.0%} above the parent's",
            _shares(mine.values(f"trained/{whole}/loss"), parent),
            WHOLE,
            " of it",
        )
    )
    other = arms.get("random")
    if other is not None:
        key = f"trained/{smallest}/kl"
        found.append(
            _claim(
                "ranking lasts",
                f"after training too, the {smallest} sub-model diverges more in random order",
                _shares(mine.values(key), other.values(key)),
                1 - 1e-9,
                " of it in order",
            )
        )
    return found


def _table(arms: dict[str, _Arm]) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    for arm in arms.values():
        kinds = {"trained": TITLES[arm.name]}
        if arm.name == "elastic":
            kinds |= {
                "activation": "cut out of the parent, in order",
                "random": "cut out of the parent, in random order",
            }
        for kind, title in kinds.items():
            for target in arm.targets:
                cost = statistics.fmean(arm.values(f"trained/{target}/cost"))
                values = (statistics.fmean(arm.values(f"{kind}/{target}/{name}")) for name in ("loss", "kl"))
                rows.append((title, target, cost, *values))
    parent = statistics.fmean(next(iter(arms.values())).values("trained/parent/loss"))
    return Table(
        title="Sub-models on held-out text, mean over seeds",
        columns=("model", "target", "cost", "loss", "divergence from the parent"),
        rows=tuple(rows),
        note=f"Costs are parameters without embedding and head, as shares of the parent's; its loss is {parent:.4f}.",
    )


def _line(arm: _Arm, kind: str, label: str) -> Line:
    rows = [Row.over_seeds("", arm.values(f"{kind}/{target}/loss")) for target in arm.targets]
    return Line(
        label=label,
        x=tuple(statistics.fmean(arm.values(f"trained/{target}/cost")) for target in arm.targets),
        y=tuple(row.value for row in rows),
        spread=tuple(row.spread for row in rows),
    )


def analyse(study: Study) -> Findings:
    """All figures and claims of the recipe."""
    arms = {name: arm for name in TITLES if (arm := _arm(study, name)) is not None}
    mine = arms.get("elastic")
    if mine is None:
        return Findings(notes=("The elastic model was not trained to the end with all seeds.",))
    lines = [_line(arm, "trained", TITLES[name]) for name, arm in arms.items()]
    lines += [
        _line(mine, "activation", "cut out without training, in order"),
        _line(mine, "random", "cut out without training, in random order"),
    ]
    rows = [
        arm.row(f"{what}, {target}", f"trained/{target}/{key}")
        for arm in arms.values()
        for target in arm.targets
        for what, key in (("loss", "loss"), ("divergence", "kl"))
    ]
    return Findings(
        rows=tuple(rows),
        claims=tuple(_claims(arms)),
        tables=(_table(arms),),
        plots=(
            Plot(
                title="Held-out loss by cost",
                x_label="parameters without embedding, of the parent's",
                y_label=f"loss ({UNIT})",
                lines=tuple(lines),
            ),
        ),
    )
