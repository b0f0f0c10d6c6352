"""The analysis of the recipe `megatron-ptdp`: pipelines' bits and times as run, bubbles and memory as simulated."""

from __future__ import annotations

import math
import statistics
from itertools import product

from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.published import Cost, Setting, cost
from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, Study, Table

ALONE, SPLIT = "accumulation", "zb_h1"
FIRST = 5  # steps that are not timed
ROUNDING = 1e-6  # of the loss: a backward pass in two halves multiplies weight gradients out in another way
CLOSE = 0.15  # of the formula (m + p - 1) / m
SHOWN = ((4, 8), (4, 16), (8, 16), (8, 64))


def simulated() -> list[Cost]:
    """The paper's schedules for every p up to 8, v up to 4 and some m that p divides, backward twice forward."""
    found = []
    for name, ranks, chunks, times in product(("gpipe", "1f1b", "interleaved"), range(1, 9), range(1, 5), (1, 2, 4)):
        if chunks > 1 and name != "interleaved":
            continue
        try:
            found.append(cost(name, Setting(ranks, chunks, times * ranks)))
        except ScheduleError:
            continue  # a combination that the schedule does not have
    return found


def step_seconds(study: Study, micros: int) -> list[float]:
    """For each seed, the median seconds of a step of so many micro-batches through two stages."""
    found = []
    for trial in study.select(grid="times", micros=str(micros)):
        seconds = [
            value for step, value in trial.record.series.get("seconds", ()) if value is not None and step > FIRST
        ]
        found.append(statistics.median(seconds) if seconds else math.nan)
    return found


def counts(study: Study) -> list[int]:
    """The numbers of micro-batches that were timed."""
    return sorted({int(str(trial.axes["micros"])) for trial in study.select(grid="times")})


def _bits(study: Study) -> list[tuple[str, int, bool]]:
    reference = {trial.seed: trial.record.weights for trial in study.select(grid="schedules", arm=ALONE)}
    return [
        (trial.arm, trial.seed, bool(trial.record.weights) and trial.record.weights == reference.get(trial.seed))
        for trial in study.select(grid="schedules")
        if trial.arm not in (ALONE, SPLIT)
    ]


def _gaps(study: Study) -> list[float]:
    """For each seed, the largest relative difference of losses between the split schedule and accumulation."""
    reference = {t.seed: dict(t.record.series.get("loss", ())) for t in study.select(grid="schedules", arm=ALONE)}
    found = []
    for trial in study.select(grid="schedules", arm=SPLIT):
        other = reference.get(trial.seed, {})
        pairs = [(value, other.get(step)) for step, value in trial.record.series.get("loss", ())]
        found.append(max((abs(a / b - 1) for a, b in pairs if a is not None and b is not None), default=math.nan))
    return found


def _ratio(study: Study) -> tuple[list[float], float]:
    """Of each seed, seconds a micro-batch with the fewest over those with the most; and the formula's."""
    few, most = counts(study)[0], counts(study)[-1]
    pairs = zip(step_seconds(study, few), step_seconds(study, most), strict=True)
    return [(a / few) / (b / most) for a, b in pairs], (1 + 1 / few) / (1 + 1 / most)


def _claims(study: Study, costs: list[Cost]) -> list[Claim]:
    bubbles = [one for one in costs if one.published_bubble is not None]
    held = [one for one in costs if one.published_held is not None]
    wrong = [one for one in bubbles if one.bubble != one.published_bubble]
    over = [one for one in held if one.held != one.published_held]
    claims = [
        Claim(
            name="bubbles are the closed forms",
            statement="the simulated bubble is (p - 1) / m of the ideal time, and 1/v of it when interleaved, exactly",
            holds=bool(bubbles) and not wrong,
            evidence=f"{len(bubbles) - len(wrong)} of {len(bubbles)} pipelines, p to 8, v to 4, m to 4p, in fractions",
        ),
        Claim(
            name="so is what ranks hold",
            statement="the fullest rank holds m (GPipe), min(m, p) (1F1B), p (1 + (p - 1) / (p v)) (interleaved)",
            holds=bool(held) and not over,
            evidence=f"{len(held) - len(over)} of {len(held)} pipelines",
        ),
    ]
    bits = _bits(study)
    if bits:
        claims.append(
            Claim(
                name="strict semantics",
                statement="GPipe, 1F1B and interleaved 1F1B leave the weights of plain accumulation, to the bit",
                holds=all(same for _, _, same in bits),
                evidence=f"{sum(same for _, _, same in bits)} of {len(bits)} runs of 2 to 4 processes",
            )
        )
    gaps = _gaps(study)
    if gaps:
        claims.append(
            Claim(
                name="halves agree to rounding",
                statement=f"with backward passes in halves (zero-bubble H1) losses agree within {ROUNDING:g}",
                holds=max(gaps) < ROUNDING,
                evidence=f"{max(gaps):.1e} at most over all steps, {len(gaps)} seeds",
            )
        )
    if len(counts(study)) > 1:
        ratios, theory = _ratio(study)
        measured = statistics.fmean(ratios)
        claims.append(
            Claim(
                name="more micro-batches, smaller bubble",
                statement=f"time a micro-batch falls with m as (m + p - 1) / m does, within {CLOSE:.0%}, p = 2",
                holds=abs(measured / theory - 1) < CLOSE,
                evidence=f"{counts(study)[0]} micro-batches take {measured:.3f} times as long, each, as "
                f"{counts(study)[-1]}; the formula says {theory:.3f}; {len(ratios)} seeds",
            )
        )
    return claims


def _table(costs: list[Cost]) -> Table:
    rows = []
    for ranks, micros in SHOWN:
        for name, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)):
            one = cost(name, Setting(ranks, chunks, micros))
            published = None if one.published_bubble is None else float(one.published_bubble)
            held = None if one.published_held is None else float(one.published_held)
            rows.append((name, ranks, chunks, micros, float(one.bubble), published, float(one.held), held))
    columns = ("schedule", "p", "v", "m", "bubble", "formula", "held", "formula")
    title = "Simulated: bubble over ideal time, activations of the fullest rank"
    return Table(title=title, columns=columns, rows=tuple(rows))


def analyse(study: Study) -> Findings:
    """Rows, claims, the table of formulas, and time against the number of micro-batches."""
    costs, timed = simulated(), counts(study)
    rows = [
        Row.over_seeds(f"seconds of a step, {micros} micro-batches, 2 stages", step_seconds(study, micros), "s")
        for micros in timed
    ]
    plots: tuple[Plot, ...] = ()
    if timed:
        each = [statistics.fmean(step_seconds(study, micros)) / micros for micros in timed]
        last = each[-1] / (1 + 1 / timed[-1])
        formula = Line(label="(m + p - 1) / m", x=tuple(timed), y=tuple(last * (1 + 1 / m) for m in timed))
        lines = (Line(label="measured", x=tuple(timed), y=tuple(each)), formula)
        plots = (Plot(title="two stages, 1F1B", x_label="micro-batches", y_label="seconds a micro-batch", lines=lines),)
    return Findings(rows=tuple(rows), claims=tuple(_claims(study, costs)), tables=(_table(costs),), plots=plots)
