"""The default analysis: one metric of every arm, and whether each arm beats the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, Study, Trial
from resilin.recipes.recipe import Recipe


def _places(trials: Sequence[Trial]) -> list[tuple[str, tuple[tuple[str, object], ...]]]:
    return list(dict.fromkeys((t.grid, tuple(t.axes.items())) for t in trials))


def _label(grid: str, axes: Sequence[tuple[str, object]], alone: bool) -> str:
    parts = [] if alone else [grid]
    return " ".join([*parts, *(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in axes)])


def compare(study: Study) -> Findings:
    """Rows of the metric by arm; one claim per arm other than the baseline and cell of the grids.

    A claim holds when the difference of the means has the right sign and exceeds the standard error of that
    difference over seeds (with one seed: the sign alone decides, and the evidence says so).
    """
    recipe: Recipe = study.recipe
    settings = recipe.compare
    baseline = settings.baseline or next(iter(recipe.arms))
    grids = recipe.grids(study.preset)
    rows: list[Row] = []
    claims: list[Claim] = []
    for grid, axes in _places(study.trials):
        where = _label(grid, axes, alone=len(grids) == 1)
        of_arm = {
            arm: Row.over_seeds(
                f"{settings.metric}, {arm}{', ' if where else ''}{where}",
                [t.record.final.get(settings.metric) for t in study.select(grid, arm, **dict(axes))],  # type: ignore[arg-type]
            )
            for arm in grids[grid].arms or recipe.arms
        }
        rows += of_arm.values()
        reference = of_arm.get(baseline)
        if reference is not None:
            claims += [
                _beats(arm, row, baseline, reference, settings.better, where)
                for arm, row in of_arm.items()
                if arm != baseline
            ]
    steps = [
        Line(label=f"{t.arm} seed {t.seed}", x=tuple(e.step for e in t.record.evaluations),
             y=tuple(e.metrics.get(settings.metric) for e in t.record.evaluations))
        for t in study.trials
    ]  # fmt: skip
    plot = Plot(title=settings.metric, x_label="step", y_label=settings.metric, lines=tuple(steps))
    return Findings(rows=tuple(rows), claims=tuple(claims), plots=(plot,))


def _beats(arm: str, row: Row, baseline: str, reference: Row, better: str, where: str) -> Claim:
    name = f"{arm} beats {baseline}{' at ' if where else ''}{where}"
    statement = f"{arm} ends {'below' if better == 'lower' else 'above'} {baseline}"
    if row.value is None or reference.value is None:
        return Claim(name=name, statement=statement, holds=False, evidence="a run did not finish with a finite value")
    gain = (reference.value - row.value) * (1 if better == "lower" else -1)
    if row.spread is None or reference.spread is None:
        return Claim(name=name, statement=statement, holds=gain > 0, evidence=f"gain {gain:.4g}, one seed")
    error = math.sqrt(row.spread**2 / row.count + reference.spread**2 / reference.count)
    evidence = f"gain {gain:.4g} with a standard error of {error:.2g} over {row.count} seeds"
    return Claim(name=name, statement=statement, holds=gain > error, evidence=evidence)
