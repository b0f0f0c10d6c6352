"""The analysis of the recipe `one-epoch`: test losses by arm, speed-ups, the best model size, the power law.

Grids it reads: `epochs` (four arms at equal steps), `more_epochs` (an arm that repeats three times as often), `sizes`
(axis `size`, equal 6 P T), `gap` (one epoch with a held-out text as hard as the training text) and `law` (a constant
learning rate). A recipe may leave any of them out: without `gap` or `law` their figures are read off the one-epoch arm
of `epochs`, whose learning rate should be constant until 75 % of the run.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from resilin.planner.monitor import Monitor
from resilin.planner.power_law import PowerLaw, fit_power_law, log_uniform, middle
from resilin.planner.rho import Pilot, fit_rho
from resilin.planner.speedup import Trace, speedup
from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, RunRecord, Study, Table, Trial
from resilin.run.events import Evaluated, StepDone

ORDER = ("one_epoch", "one_epoch_dropout", "repeated_dropout", "repeated")
TITLES = {
    "one_epoch": "one epoch",
    "one_epoch_dropout": "one epoch, dropout",
    "repeated_dropout": "repeated, dropout",
    "repeated": "repeated",
    "repeated_more_dropout": "repeated three times as often, dropout",
}
LEAST_SPEEDUP = 1.5
SMALL_GAP = 0.1  # no text is exactly as hard as another: a few hundredths of a nat are not over-fitting
LAW_UNTIL, LAW_AT, LAW_WITHIN = 0.3, 0.7, 0.02


def trace(record: RunRecord, per_step: float = 1.0) -> Trace:
    """The held-out loss after each evaluation but the one before training, in steps times `per_step`."""
    points = [(e.step * per_step, e.metrics["loss"]) for e in record.evaluations if e.step > 0]
    known = [(time, loss) for time, loss in points if loss is not None]
    return Trace(tuple(time for time, _ in known), tuple(loss for _, loss in known))


def online(record: RunRecord, first: float, last: float) -> float:
    """The mean training loss (before each update) of a part of a run, in shares of it."""
    points = [(step, loss) for step, loss in record.series["loss"] if loss is not None]
    total = points[-1][0]
    return statistics.fmean(loss for step, loss in points if first * total < step <= last * total)


def gap(record: RunRecord) -> float:
    """Held-out loss at the end minus training loss over the last twentieth."""
    return trace(record).final - online(record, 0.95, 1.0)


def declared_at(record: RunRecord) -> float | None:
    """The step at which the monitor declares over-fitting of repeated data, or None."""
    settings = record.settings
    unique = settings["source"].get("unique_tokens")
    batch = settings["train"]["batch_size"] * settings["source"]["sequence_length"]
    losses = {step: loss for step, loss in record.series["loss"] if loss is not None}
    held_out = {e.step: e.metrics["loss"] for e in record.evaluations}
    monitor = Monitor(max(losses), steps_per_epoch=unique / batch if unique else None)
    for step in range(1, max(losses) + 1):
        if step in losses:
            monitor(StepDone(step=step, loss=losses[step], lr=0.0, grad_norm=0.0, units=batch, seconds=0.0))
        if held_out.get(step) is not None:
            monitor(Evaluated(step=step, name="validation", metrics={"loss": float(held_out[step] or math.nan)}))
    return None if monitor.over_fitting is None else float(monitor.over_fitting.step)


def _finished(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.record.status == "finished" and len(trial.record.evaluations) > 1]


def _error(a: Row, b: Row) -> float:
    """Standard error of the difference of two means over seeds; 0 with single seeds."""
    return math.sqrt(sum((row.spread or 0.0) ** 2 / row.count for row in (a, b)))


def _below(better: str, worse: str, rows: dict[str, Row]) -> Claim:
    a, b = rows[better], rows[worse]
    statement = f"{TITLES[better]} ends at a lower test loss than {TITLES[worse]}"
    if a.value is None or b.value is None:
        return Claim(name=f"{better} < {worse}", statement=statement, holds=False, evidence="a run was not finite")
    error = _error(a, b)
    evidence = f"{a.value:.3f} against {b.value:.3f}, standard error of the difference {error:.3f}, {a.count} seeds"
    return Claim(name=f"{better} < {worse}", statement=statement, holds=b.value - a.value > error, evidence=evidence)


@dataclass(frozen=True, slots=True)
class _Part:
    """What one grid contributes."""

    rows: tuple[Row, ...] = ()
    claims: tuple[Claim, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    notes: tuple[str, ...] = ()


def _mean_line(label: str, traces: Sequence[Trace]) -> Line:
    """The mean of some curves with common times, and their spread."""
    columns = list(zip(*(t.losses for t in traces), strict=True))
    spread = tuple(statistics.stdev(c) if len(c) > 1 else None for c in columns)
    return Line(label=label, x=traces[0].times, y=tuple(statistics.fmean(c) for c in columns), spread=spread)


def _epochs(study: Study) -> _Part:
    by_arm = {arm: _finished(study.select("epochs", arm)) for arm in ORDER}
    by_arm = {arm: trials for arm, trials in by_arm.items() if trials}
    if "one_epoch" not in by_arm:
        return _Part()
    final = {
        arm: Row.over_seeds(f"test loss, {TITLES[arm]}", [trace(t.record).final for t in trials], unit="nat/token")
        for arm, trials in by_arm.items()
    }
    best = [
        Row.over_seeds(f"best test loss on the way, {TITLES[arm]}", [trace(t.record).best for t in trials], "nat/token")
        for arm, trials in by_arm.items()
        if arm.startswith("repeated")
    ]
    of_gap = {"one_epoch": _finished(study.select("gap", "one_epoch")) or by_arm["one_epoch"]}
    of_gap |= {"repeated": by_arm["repeated"]} if "repeated" in by_arm else {}
    gaps = {
        arm: Row.over_seeds(f"test minus training loss, {TITLES[arm]}", [gap(t.record) for t in trials], "nat/token")
        for arm, trials in of_gap.items()
    }
    present = [arm for arm in ORDER if arm in by_arm]
    claims = [_below(a, b, final) for a, b in itertools.pairwise(present)]
    if "repeated" in gaps:
        claims.append(_no_gap(gaps["one_epoch"], gaps["repeated"]))
    speedups = []
    for arm in ("repeated_dropout", "repeated"):
        if arm in by_arm:
            paper = "1.9x to 3.3x" if arm == "repeated_dropout" else ""
            values = _speedups(by_arm["one_epoch"], by_arm[arm])
            speedups.append(Row.over_seeds(f"speed-up over the best of {TITLES[arm]}", values, "x in steps", paper))
    if "repeated_dropout" in by_arm:
        claims.append(_fast(speedups[0]))
    more = _finished(study.select("more_epochs", "repeated_more_dropout"))
    if more:
        values = _speedups(by_arm["one_epoch"], more)
        label = f"speed-up over the best of {TITLES['repeated_more_dropout']}"
        speedups.append(Row.over_seeds(label, values, "x in steps", "more with more epochs"))
        if "repeated_dropout" in by_arm:
            claims.append(_faster_still(speedups[0], speedups[-1]))
    plot = Plot(
        title="Test loss at equal steps",
        x_label="step",
        y_label="test loss (nat/token)",
        lines=tuple(_mean_line(TITLES[arm], [trace(t.record) for t in by_arm[arm]]) for arm in present),
    )
    declared = [
        Row.over_seeds(
            f"over-fitting declared after, {TITLES[arm]}", [declared_at(t.record) for t in by_arm[arm]], "steps"
        )
        for arm in ("repeated_dropout", "repeated")
        if arm in by_arm
    ]
    return _Part((*final.values(), *best, *gaps.values(), *speedups, *declared), tuple(claims), (), (plot,))


def _speedups(ours: Sequence[Trial], theirs: Sequence[Trial]) -> list[float]:
    """Steps of the baseline to its best test loss over our steps to the same, seed by seed."""
    by_seed = {trial.seed: trace(trial.record) for trial in ours}
    found = []
    for trial in theirs:
        baseline = trace(trial.record)
        found.append(speedup(baseline, by_seed[trial.seed], baseline.best))
    return found


def _no_gap(once: Row, many: Row) -> Claim:
    one, other = once.value or 0.0, many.value or 0.0
    return Claim(
        name="no generalisation gap",
        statement=f"test minus training loss after one epoch is below {SMALL_GAP:.0%} of what it is after many",
        holds=abs(one) <= SMALL_GAP * other,
        evidence=f"{one:+.3f} over {once.count} seeds against {other:+.3f} over {many.count}",
    )


def _fast(row: Row) -> Claim:
    value, error = row.value or 0.0, (row.spread or 0.0) / math.sqrt(row.count)
    return Claim(
        name="faster than many epochs with dropout",
        statement=f"one epoch reaches the best test loss of repeated data with dropout {LEAST_SPEEDUP}x sooner",
        holds=value - error >= LEAST_SPEEDUP,
        evidence=f"{value:.2f}x in steps, standard error {error:.2f}, {row.count} seeds",
    )


def _faster_still(few: Row, many: Row) -> Claim:
    a, b, error = few.value or 0.0, many.value or 0.0, _error(few, many)
    return Claim(
        name="the more epochs, the greater the speed-up",
        statement="against three times as many epochs over a third of the data the speed-up is greater",
        holds=b - a > error,
        evidence=f"{b:.2f}x against {a:.2f}x, standard error of the difference {error:.2f}",
    )


@dataclass(frozen=True, slots=True)
class _Size:
    """The runs of one model size at the common FLOPs."""

    name: str
    parameters: int
    tokens: float
    trials: tuple[Trial, ...]

    @property
    def ratio(self) -> float:
        return self.tokens / self.parameters

    @property
    def row(self) -> Row:
        losses = [trace(trial.record).final for trial in self.trials]
        return Row.over_seeds(f"test loss at T/P = {self.ratio:.3g}", losses, "nat/token")

    def flops_trace(self, trial: Trial) -> Trace:
        return trace(trial.record, 6.0 * self.parameters * _batch_tokens(trial))


def _batch_tokens(trial: Trial) -> int:
    settings = trial.record.settings
    return int(settings["train"]["batch_size"]) * int(settings["source"]["sequence_length"])


def _by_size(study: Study) -> list[_Size]:
    trials = _finished(study.select("sizes"))
    found = []
    for name in dict.fromkeys(str(t.axes["size"]) for t in trials):
        mine = tuple(t for t in trials if t.axes["size"] == name)
        steps = mine[0].record.evaluations[-1].step
        found.append(_Size(name, mine[0].record.non_embedding, float(steps * _batch_tokens(mine[0])), mine))
    return sorted(found, key=lambda size: size.ratio)


def _sizes(study: Study) -> _Part:
    sizes = _by_size(study)
    if len(sizes) < 3:
        return _Part()
    rows = [size.row for size in sizes]
    means = [row.value if row.value is not None else math.inf for row in rows]
    place = means.index(min(means))
    best, low, high = sizes[place], sizes[0], sizes[-1]
    rise_low, rise_high = means[0] - means[place], means[-1] - means[place]
    errors = _error(rows[0], rows[place]), _error(rows[-1], rows[place])
    claim = Claim(
        name="a middle T/P is best",
        statement="at fixed FLOPs the test loss over tokens per parameter has its minimum away from both ends",
        holds=0 < place < len(sizes) - 1 and rise_low > errors[0] and rise_high > errors[1],
        evidence=(
            f"least at T/P = {best.ratio:.3g}; {rise_low:+.3f} (standard error {errors[0]:.3f}) at {low.ratio:.3g} "
            f"and {rise_high:+.3f} ({errors[1]:.3f}) at {high.ratio:.3g}"
        ),
    )
    measured = [
        Row.over_seeds(
            f"speed-up of T/P = {best.ratio:.3g} over {other.ratio:.3g}", _gain(best, other), "x in FLOPs", paper
        )
        for other, paper in ((low, "1x to 2.7x"), (high, ""))
        if other is not best
    ]
    rhos = _rhos(sizes, study)
    if any(rho is not None for rho in rhos):
        measured.append(Row.over_seeds("best T/P, parabola through the sizes", rhos, "tokens/parameter", "about 5"))
    notes = () if 0 < place < len(sizes) - 1 else (_edge(best, place == 0),)
    table = Table(
        title="Equal FLOPs (6 P T), P without embeddings",
        columns=("layers and width", "P", "T", "T/P", "test loss", "spread over seeds"),
        rows=tuple(
            (size.name, size.parameters, int(size.tokens), round(size.ratio, 2), row.value, row.spread)
            for size, row in zip(sizes, rows, strict=True)
        ),
    )
    line = Line(
        label=f"mean of {rows[0].count} seeds",
        x=tuple(size.ratio for size in sizes),
        y=tuple(row.value for row in rows),
        spread=tuple(row.spread for row in rows),
    )
    plot = Plot(
        title="Fixed FLOPs",
        x_label="tokens per parameter",
        y_label="test loss (nat/token)",
        x_log=True,
        lines=(line,),
    )
    return _Part(tuple(measured), (claim,), (table,), (plot,), notes)


def _edge(best: _Size, lowest: bool) -> str:
    side, where = ("largest", "below") if lowest else ("smallest", "above")
    return f"Of the sizes tried the {side} is best: if there is a valley, it lies at or {where} T/P = {best.ratio:.3g}."


def _rhos(sizes: Sequence[_Size], study: Study) -> list[float | None]:
    """The T/P of least loss by seed; None where the losses show no valley."""
    found = []
    for seed in study.seeds():
        pilots = [
            Pilot(size.parameters, size.tokens, trace(trial.record).final, cost=size.parameters * size.tokens)
            for size in sizes
            for trial in size.trials
            if trial.seed == seed
        ]
        costs = [pilot.cost for pilot in pilots]
        if len(pilots) == len(sizes) and max(costs) < 1.1 * min(costs):  # overridden steps are not of equal cost
            found.append(fit_rho(pilots))
    return found


def _gain(best: _Size, other: _Size) -> list[float]:
    """FLOPs of the other size to its final loss over FLOPs of the best to the same, seed by seed."""
    if best is other:
        return [1.0 for _ in other.trials]
    by_seed = {trial.seed: best.flops_trace(trial) for trial in best.trials}
    return [speedup(other.flops_trace(t), by_seed[t.seed]) for t in other.trials if t.seed in by_seed]


@dataclass(frozen=True, slots=True)
class _Forecast:
    """A law fitted to the first part of a run, and what came later."""

    law: PowerLaw
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def forecast(record: RunRecord, floor: bool = False) -> _Forecast:
    """The law of the first 30 % of the online loss (after warm-up and 5 %), held against the loss around 70 %."""
    points = [(float(step), loss) for step, loss in record.series["loss"] if loss is not None]
    total = points[-1][0]
    times, losses = [t for t, _ in points], [loss for _, loss in points]
    early = middle(times, losses, total, decay_from=LAW_UNTIL * total)
    law = fit_power_law(*log_uniform(*early, bins=32), floor=floor)
    measured = online(record, LAW_AT - 0.05, LAW_AT + 0.05)
    return _Forecast(law, law.loss(LAW_AT * total), measured)


def _law(study: Study) -> _Part:
    trials = _finished(study.select("law")) or _finished(study.select("epochs", "one_epoch"))
    if not trials:
        return _Part()
    plain = [forecast(trial.record) for trial in trials]
    floored = [forecast(trial.record, floor=True) for trial in trials]
    errors = Row.over_seeds("error of the loss predicted at 70 %", [abs(f.error) * 100 for f in plain], "%")
    rows = (
        Row.over_seeds("exponent k of a t^-k", [f.law.k for f in plain]),
        errors,
        Row.over_seeds("the same with a floor", [abs(f.error) * 100 for f in floored], "%"),
    )
    claim = Claim(
        name="the law predicts itself",
        statement=f"a power law fitted to the first 30 % predicts the loss at 70 % within {LAW_WITHIN:.0%}",
        holds=all(abs(f.error) <= LAW_WITHIN for f in plain),
        evidence="; ".join(f"{f.predicted:.3f} against {f.measured:.3f} ({f.error:+.1%})" for f in plain),
    )
    record, first = trials[0].record, plain[0]
    points = [(float(step), loss) for step, loss in record.series["loss"] if loss is not None]
    times, losses = log_uniform([t for t, _ in points], [loss for _, loss in points], bins=80)
    fitted = tuple(t for t in times if t > 0.05 * points[-1][0])
    plot = Plot(
        title="Power law, constant learning rate",
        x_label="step",
        y_label="training loss (nat/token)",
        x_log=True,
        y_log=True,
        lines=(
            Line(label=f"seed {trials[0].seed}", x=tuple(times), y=tuple(losses)),
            Line(label="law of the first 30 %", x=fitted, y=tuple(first.law.loss(t) for t in fitted)),
        ),
    )
    return _Part(rows, (claim,), (), (plot,))


def _epoch_gains(study: Study) -> list[float]:
    """By seed: one epoch over many with dropout."""
    ours, theirs = (_finished(study.select("epochs", arm)) for arm in ("one_epoch", "repeated_dropout"))
    return _speedups(ours, theirs) if ours else []


def _size_gains(study: Study) -> list[float]:
    """By seed: the best size over the one that is too large for its tokens."""
    sizes = _by_size(study)
    if len(sizes) < 3:
        return []
    best = min(sizes, key=lambda size: math.inf if size.row.value is None else size.row.value)
    return _gain(best, sizes[0])


def analyse(study: Study) -> Findings:
    """All figures and claims of the recipe."""
    parts = [_epochs(study), _sizes(study), _law(study)]
    both = [math.prod(pair) for pair in zip(_epoch_gains(study), _size_gains(study), strict=False)]
    together = (Row.over_seeds("both speed-ups multiplied", both, "x", "3.3x to 5.1x"),) if both else ()
    return Findings(
        rows=(*(row for part in parts for row in part.rows), *together),
        claims=tuple(claim for part in parts for claim in part.claims),
        tables=tuple(table for part in parts for table in part.tables),
        plots=tuple(plot for part in parts for plot in part.plots),
        notes=tuple(note for part in parts for note in part.notes),
    )
