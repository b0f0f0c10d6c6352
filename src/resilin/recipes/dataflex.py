"""The analysis of the recipe `dataflex`: what selectors pick and reach, how mixers serve the domains, what weights do.

Grids it reads: `conflict`, `code` and `select` (selection; part 0 of the pool is the relevant one, and evaluation is on
held-out text of it), `mix` and `experts` (domains; evaluation logs the loss of each) and `weigh` (weights; evaluation
is on held-out text of the relevant part). A recipe may leave any of them out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, RunRecord, Study, Table, Trial

SELECTION = {
    "conflict": "text of permuted bytes",
    "code": "Python source",
    "select": "general text",
}
MIXING = {"mix": "", "experts": ", mixture of experts"}
SHARE_WANTED = 0.7


@dataclass(frozen=True, slots=True)
class _Part:
    rows: tuple[Row, ...] = ()
    claims: tuple[Claim, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    notes: tuple[str, ...] = ()


def _finished(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.record.status == "finished" and trial.record.evaluations]


def _arms(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.arm, []).append(trial)
    return found


def picked(record: RunRecord) -> float | None:
    """The share of relevant samples over all steps after the first warm-up."""
    warmup = int(record.settings["source"]["warmup_steps"])
    values = [v for step, v in record.series.get("share/0", ()) if v is not None and step > warmup]
    return statistics.fmean(values) if values else None


def _error(a: Row, b: Row) -> float:
    """Standard error of the difference of two means over seeds; 0 with single seeds."""
    return math.sqrt(sum((row.spread or 0.0) ** 2 / row.count for row in (a, b)))


def _below(name: str, statement: str, ours: Row, theirs: Row) -> Claim:
    if ours.value is None or theirs.value is None:
        return Claim(name=name, statement=statement, holds=False, evidence="a run was not finite")
    error = _error(ours, theirs)
    return Claim(
        name=name,
        statement=statement,
        holds=theirs.value - ours.value > error,
        evidence=f"{ours.value:.3f} against {theirs.value:.3f}, standard error of the difference {error:.3f}, "
        f"{ours.count} seeds",
    )


def _target_losses(arms: dict[str, list[Trial]], where: str = "") -> dict[str, Row]:
    """The loss on the held-out target at the end of each arm."""
    return {
        arm: Row.over_seeds(
            f"held-out loss on the target, {arm}{where}", [t.record.final.get("loss") for t in trials], "nat/token"
        )
        for arm, trials in arms.items()
    }


def _selection(study: Study, grid: str, rest: str) -> _Part:
    arms = _arms(_finished(study.select(grid)))
    if "random" not in arms:
        return _Part()
    losses = _target_losses(arms, f", pool with {rest}")
    shares = {
        arm: Row.over_seeds(f"relevant share picked, {arm}, pool with {rest}", [picked(t.record) for t in trials])
        for arm, trials in arms.items()
    }
    claims = [
        _below(
            f"{arm} < random ({grid})", f"{arm} ends at a lower target loss than random choice from a pool with {rest}",
            losses[arm], losses["random"],
        )
        for arm in arms
        if arm != "random"
    ]  # fmt: skip
    if grid == "conflict" and "less_sgd_max" in arms:
        claims.append(_finds(shares["less_sgd_max"]))
    beaten = [arm for arm, claim in zip([a for a in arms if a != "random"], claims, strict=False) if not claim.holds]
    notes = (f"With {rest}, not better than random here: {', '.join(beaten)}.",) if beaten else ()
    table = Table(
        title=f"Selection from a pool with {rest}",
        columns=("selector", "target loss", "spread", "relevant share picked", "spread"),
        rows=tuple((arm, losses[arm].value, losses[arm].spread, shares[arm].value, shares[arm].spread) for arm in arms),
        note="A quarter of the conflict and code pools is relevant; random choice picks that share.",
    )
    lines = tuple(
        Line(label=arm, x=tuple(float(step) for step in steps), y=tuple(values))
        for arm, trials in arms.items()
        if (found := _mean_share(trials)) is not None
        for steps, values in (found,)
    )
    plot = Plot(title=f"Relevant share, pool with {rest}", x_label="step", y_label="share of the batch", lines=lines)
    return _Part((*losses.values(), *shares.values()), tuple(claims), (table,), (plot,), notes)


def _finds(row: Row) -> Claim:
    value, error = row.value or 0.0, (row.spread or 0.0) / math.sqrt(row.count)
    return Claim(
        name="LESS finds the relevant samples",
        statement=f"LESS with plain gradients and the best target sample picks at least {SHARE_WANTED:.0%} relevant",
        holds=value - error >= SHARE_WANTED,
        evidence=f"{value:.3f}, standard error {error:.3f}, {row.count} seeds",
    )


def _mean_share(trials: Sequence[Trial]) -> tuple[list[int], list[float]] | None:
    """The relevant share over windows of ten steps, mean over seeds."""
    series = [dict(trial.record.series.get("share/0", ())) for trial in trials]
    common = sorted(set.intersection(*(set(one) for one in series))) if series else []
    if not common:
        return None
    width = max(1, len(common) // 12)
    steps, values = [], []
    for start in range(0, len(common), width):
        part = common[start : start + width]
        found = [v for one in series for step in part if (v := one[step]) is not None]
        if found:
            steps.append(part[-1])
            values.append(statistics.fmean(found))
    return steps, values


def _domain_losses(record: RunRecord) -> dict[str, float]:
    found = {k.removeprefix("nll/"): v for k, v in record.final.items() if k.startswith("nll/") and v is not None}
    return dict(sorted(found.items()))


def _mixing(study: Study, grid: str, model: str) -> _Part:
    arms = _arms([t for t in _finished(study.select(grid)) if _domain_losses(t.record)])
    if "uniform" not in arms:
        return _Part()
    losses = {arm: [_domain_losses(t.record) for t in trials] for arm, trials in arms.items()}
    worst = {
        arm: Row.over_seeds(
            f"held-out loss of the worst domain, {arm}{model}", [max(d.values()) for d in found], "nat/token"
        )
        for arm, found in losses.items()
    }
    mean = {
        arm: Row.over_seeds(
            f"held-out loss, mean of the domains, {arm}{model}",
            [statistics.fmean(d.values()) for d in found],
            "nat/token",
        )
        for arm, found in losses.items()
    }
    claims = []
    for arm in arms:
        if arm not in ("uniform", "random_mix"):
            statement = f"{arm} ends with a lower loss of the worst domain than uniform proportions{model}"
            claims.append(_below(f"worst domain, {arm} < uniform{model}", statement, worst[arm], worst["uniform"]))
            statement = f"{arm} ends with a lower mean loss of the domains than uniform proportions{model}"
            claims.append(_below(f"mean, {arm} < uniform{model}", statement, mean[arm], mean["uniform"]))
    names = list(losses["uniform"][0])
    table = Table(
        title=f"Mixing three domains{model}",
        columns=("mixer", *(f"loss, {n}" for n in names), *(f"share, {n}" for n in names), "worst", "mean"),
        rows=tuple(
            (
                arm,
                *(statistics.fmean(d[name] for d in losses[arm]) for name in names),
                *(_share(trials, name) for name in names),
                worst[arm].value,
                mean[arm].value,
            )
            for arm, trials in arms.items()
        ),
        note="Shares are of the training samples, over the whole run.",
    )
    lines = tuple(
        Line(label=arm, x=tuple(float(i) for i in range(len(names))), y=tuple(_share(trials, n) for n in names))
        for arm, trials in arms.items()
    )
    labels = ", ".join(f"{number} {name}" for number, name in enumerate(names))
    plot = Plot(title=f"Share of each domain{model}", x_label=labels, y_label="share of the samples", lines=lines)
    return _Part((*worst.values(), *mean.values()), tuple(claims), (table,), (plot,))


def _weighing(study: Study) -> _Part:
    arms = _arms(_finished(study.select("weigh")))
    if "unweighted" not in arms:
        return _Part()
    losses = _target_losses(arms)
    claims = [
        _below(
            f"{arm} < unweighted", f"{arm} ends at a lower target loss than the same samples unweighted",
            losses[arm], losses["unweighted"],
        )
        for arm in arms
        if arm != "unweighted"
    ]  # fmt: skip
    table = Table(
        title="Weighing the samples of a pool of which a quarter is relevant",
        columns=("weights", "target loss", "spread"),
        rows=tuple((arm, row.value, row.spread) for arm, row in losses.items()),
    )
    return _Part((*losses.values(),), tuple(claims), (table,))


def _share(trials: Sequence[Trial], name: str) -> float | None:
    values = [v for t in trials for _, v in t.record.series.get(f"share/{name}", ()) if v is not None]
    return statistics.fmean(values) if values else None


def analyse(study: Study) -> Findings:
    """Every grid that is there."""
    parts = [_selection(study, grid, rest) for grid, rest in SELECTION.items()]
    parts += [_mixing(study, grid, model) for grid, model in MIXING.items()]
    parts.append(_weighing(study))
    return Findings(
        rows=tuple(row for part in parts for row in part.rows),
        claims=tuple(claim for part in parts for claim in part.claims),
        tables=tuple(table for part in parts for table in part.tables),
        plots=tuple(plot for part in parts for plot in part.plots),
        notes=tuple(note for part in parts for note in part.notes),
    )
