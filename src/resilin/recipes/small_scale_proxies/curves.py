"""Final loss over learning rate, by seed: what most of the paper's comparisons start from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from resilin.evaluate.stability import capped, lr_sensitivity
from resilin.recipes.findings import Claim, RunRecord, Study, Trial
from resilin.recipes.recipe import Value

LOSS = "nll"
"""Cross-entropy without z-loss: the metric that arms with and without it share."""

LABELS = {
    "none": "without qk-norm",
    "qk_norm": "qk-norm",
    "standard": "qk-norm and z-loss",
    "qk_norm_width": "qk-norm over the width and z-loss",
    "coupled_decay": "coupled decay 0.1",
    "no_decay": "no decay",
    "no_decay_no_z_loss": "no decay, no z-loss",
    "mup_simple": "muParam (simple)",
    "mup_intermediate": "muParam (intermediate)",
    "mup_full": "muParam (full)",
}


def label(arm: str) -> str:
    """An arm in words."""
    return LABELS.get(arm, arm)


@dataclass(frozen=True, slots=True)
class Sweep:
    """One model and intervention over a set of learning rates.

    Attributes:
        arm: the intervention.
        place: the values of the grid's other axes.
        losses: by seed, the final loss at each learning rate (None: not finite).
        initial: by seed, the loss at initialisation.
        records: by (learning rate, seed).
    """

    arm: str
    place: tuple[tuple[str, Value], ...]
    losses: dict[int, dict[float, float | None]]
    initial: dict[int, float]
    records: dict[tuple[float, int], RunRecord]

    @property
    def rates(self) -> list[float]:
        """The learning rates, rising."""
        return sorted({lr for lr, _ in self.records})

    @property
    def parameters(self) -> int:
        """Parameters of the model without embedding and head."""
        return next(iter(self.records.values())).non_embedding

    def sensitivity(self, rates: Sequence[float] | None = None) -> dict[int, float]:
        """Learning rate sensitivity of each seed, over these learning rates or all."""
        chosen = self.rates if rates is None else rates
        return {
            seed: lr_sensitivity([curve[lr] for lr in chosen], self.initial[seed])
            for seed, curve in self.losses.items()
        }

    def best(self) -> dict[int, float]:
        """The lowest final loss of each seed."""
        return {s: min(capped(x, self.initial[s]) for x in curve.values()) for s, curve in self.losses.items()}

    def mean_curve(self) -> dict[float, float]:
        """Final loss over seeds, by learning rate; what is not finite counts as untrained."""
        return {
            lr: statistics.fmean(capped(curve[lr], self.initial[s]) for s, curve in self.losses.items())
            for lr in self.rates
        }

    def spread(self) -> dict[float, float | None]:
        """Sample standard deviation over seeds, by learning rate."""
        if len(self.losses) < 2:
            return dict.fromkeys(self.rates)
        return {
            lr: statistics.stdev(capped(curve[lr], self.initial[s]) for s, curve in self.losses.items())
            for lr in self.rates
        }

    def largest(self, series: str) -> dict[float, list[float]]:
        """The largest value a logged quantity ever had: one number for each seed, by learning rate."""
        found: dict[float, list[float]] = {}
        for (lr, _), record in sorted(self.records.items()):
            values = [v if v is not None else math.inf for _, v in record.series.get(series, ())]
            if values:
                found.setdefault(lr, []).append(max(values))
        return found


def sweeps(study: Study, grid: str) -> list[Sweep]:
    """The sweeps over learning rate of a grid with an axis `lr`; [] where the preset has no such grid."""
    groups: dict[tuple[str, tuple[tuple[str, Value], ...]], list[Trial]] = {}
    for trial in study.select(grid):
        if "lr" in trial.axes:
            place = tuple((k, v) for k, v in trial.axes.items() if k != "lr")
            groups.setdefault((trial.arm, place), []).append(trial)
    return [_sweep(arm, place, trials) for (arm, place), trials in groups.items()]


def _sweep(arm: str, place: tuple[tuple[str, Value], ...], trials: Sequence[Trial]) -> Sweep:
    losses: dict[int, dict[float, float | None]] = {}
    initial: dict[int, float] = {}
    records = {}
    for trial in trials:
        lr = float(trial.axes["lr"])
        records[lr, trial.seed] = trial.record
        losses.setdefault(trial.seed, {})[lr] = trial.record.final.get(LOSS)
        start = trial.record.initial.get(LOSS)
        if start is not None:
            initial[trial.seed] = start
    return Sweep(arm, place, losses, initial, records)


def one(found: Sequence[Sweep], arm: str, **place: Value) -> Sweep | None:
    """The sweep of an arm at a place; None where there is none."""
    for sweep in found:
        if sweep.arm == arm and all(dict(sweep.place).get(k) == v for k, v in place.items()):
            return sweep
    return None


def in_every_seed(name: str, statement: str, differences: Sequence[float], unit: str = "") -> Claim:
    """A claim that holds when a difference is positive in every seed; the evidence is its mean and spread."""
    if not differences:
        return Claim(name=name, statement=statement, holds=False, evidence="no runs to compare")
    spread = f" ± {statistics.stdev(differences):.2g}" if len(differences) > 1 else ""
    positive = sum(d > 0 for d in differences)
    evidence = (
        f"difference {statistics.fmean(differences):.3g}{spread}{f' {unit}' if unit else ''}, positive in {positive} "
        f"of {len(differences)} seed{'s' if len(differences) > 1 else ''}"
    )
    return Claim(name=name, statement=statement, holds=positive == len(differences), evidence=evidence)


def paired(high: dict[int, float], low: dict[int, float]) -> list[float]:
    """`high - low` for each seed that both have."""
    return [high[seed] - low[seed] for seed in sorted(high.keys() & low.keys())]
