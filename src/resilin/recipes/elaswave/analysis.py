"""The analysis of the recipe `elaswave`: how far runs that lose replicas go from those that do not, and how quickly."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from types import MappingProxyType

from resilin.cluster.axes import Clocks, Layers, Machine, Pipeline
from resilin.cluster.axes.policies import ALL, DROPPED, GRAPH, INTACT, RESHAPE, WHOLE, Policy, policies
from resilin.parallel.pipeline import even
from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, RunRecord, Study, Table, Trial

SHARE = 0.22
"""Of the first baseline's deviation that may be left: the paper removes about 78 %."""
FLOOR = 1e-10
"""Of deviations in the picture."""


@dataclass(frozen=True, slots=True)
class Task:
    """One model and its data.

    Attributes:
        grid: of the recipe.
        title: for people.
        slot, rank: the arms without a loss, with random numbers of slots and of ranks.
        unit: of its loss.
    """

    grid: str
    title: str
    unit: str
    slot: str = "undisturbed"
    rank: str = "undisturbed_rank"


TASKS = (Task("digits", "digits", "nat/sample"), Task("text", "Shakespeare", "nat/token"))
OURS = {"exact": "real kills, exact", "tolerance": "real kills, fast sums", "reshape": "micro-batches reshaped"}
BASELINES = {
    "kept_rank": "batch kept, random numbers per rank",
    "dropped_rank": "shard dropped, random numbers per rank",
}

# ---- loss ------------------------------------------------------------------------------------------------------------


def validation(record: RunRecord) -> dict[int, float]:
    """The validation loss by step."""
    found = {one.step: one.metrics.get("loss") for one in record.evaluations}
    return {step: loss for step, loss in found.items() if loss is not None}


def first_loss(trial: Trial) -> int:
    """After how many steps the first replica is lost."""
    return int(trial.record.settings["objective"]["lost"][0][0])


def deviations(study: Study, task: Task, arm: str) -> dict[int, dict[int, float]]:
    """For each seed, |validation loss - that of the run without a loss| at each evaluation after the first one."""
    reference = task.rank if arm in BASELINES else task.slot
    other = {trial.seed: validation(trial.record) for trial in study.select(grid=task.grid, arm=reference)}
    found = {}
    for trial in study.select(grid=task.grid, arm=arm):
        mine, there = validation(trial.record), other.get(trial.seed, {})
        after = first_loss(trial)
        found[trial.seed] = {step: abs(mine[step] - there[step]) for step in mine if step in there and step > after}
    return found


def means(study: Study, task: Task, arm: str) -> list[float]:
    """For each seed the mean deviation."""
    return [statistics.fmean(values.values()) for values in deviations(study, task, arm).values() if values]


def same_bits(study: Study, task: Task, arm: str) -> list[bool]:
    """For each seed, whether every training loss, every evaluation and the final weights are the undisturbed run's."""
    reference = {trial.seed: trial.record for trial in study.select(grid=task.grid, arm=task.slot)}
    found = []
    for trial in study.select(grid=task.grid, arm=arm):
        mine, other = trial.record, reference.get(trial.seed)
        found.append(
            other is not None
            and bool(mine.weights)
            and mine.weights == other.weights
            and bool(mine.series.get("loss"))
            and mine.series == other.series
            and validation(mine) == validation(other)
        )
    return found


def _facts(study: Study, name: str) -> list[float]:
    found = [t.record.final.get(f"cluster/{name}") for t in study.trials]
    return [value for value in found if value is not None]


def _claims_of(study: Study, task: Task) -> list[Claim]:
    claims = []
    bits = same_bits(study, task, "exact")
    if bits:
        killed = sum(
            int(trial.record.final.get("cluster/killed") or 0) for trial in study.select(grid=task.grid, arm="exact")
        )
        claims.append(
            Claim(
                name=f"{task.title}: the same bits",
                statement=f"{task.title}: with real workers killed, exact mode has every loss, every evaluation and "
                "the weights of the run that lost nobody, to the bit",
                holds=all(bits) and killed > 0,
                evidence=f"{sum(bits)} of {len(bits)} seeds; {killed} workers killed",
            )
        )
    first, dropped = means(study, task, "kept_rank"), means(study, task, "dropped_rank")
    if first and dropped:
        claims.append(
            Claim(
                name=f"{task.title}: dropping deviates more",
                statement=f"{task.title}, random numbers per rank: dropping the shard deviates more than keeping "
                "the batch",
                holds=statistics.fmean(dropped) > statistics.fmean(first),
                evidence=f"{statistics.fmean(dropped):.2e} against {statistics.fmean(first):.2e} {task.unit}, "
                f"{len(dropped)} seeds",
            )
        )
    for arm in ("tolerance", "reshape"):
        mine = means(study, task, arm)
        if not mine or not first:
            continue
        share = statistics.fmean(mine) / statistics.fmean(first) if statistics.fmean(first) else float("inf")
        claims.append(
            Claim(
                name=f"{task.title}: {arm} deviates by at most {SHARE:.0%}",
                statement=f"{task.title}, {OURS[arm]}: the deviation is at most {SHARE:.0%} of that with the batch "
                "kept and random numbers per rank",
                holds=share <= SHARE,
                evidence=f"{share:.2e} of it: {statistics.fmean(mine):.2e} against {statistics.fmean(first):.2e} "
                f"{task.unit}, {len(mine)} seeds",
            )
        )
    return claims


def _rows_of(study: Study, task: Task) -> list[Row]:
    rows = []
    for arm, title in (OURS | BASELINES).items():
        if found := means(study, task, arm):
            rows.append(Row.over_seeds(f"{task.title}: mean deviation, {title}", found, task.unit))
    first = means(study, task, "kept_rank")
    for arm in ("exact", "tolerance", "reshape"):
        mine = means(study, task, arm)
        if mine and first and all(first):
            saved = [100 * (1 - a / b) for a, b in zip(mine, first, strict=True)]
            name = f"{task.title}: deviation removed, {OURS[arm]}"
            rows.append(Row.over_seeds(name, saved, "%", paper="about 78 %"))
    return rows


def _plot_of(study: Study, task: Task) -> Plot | None:
    lines = []
    for arm, title in (OURS | BASELINES).items():
        found = list(deviations(study, task, arm).values())
        if found:
            steps = sorted(set.intersection(*map(set, found)))
            values = tuple(max(statistics.fmean(one[step] for one in found), FLOOR) for step in steps)
            lines.append(Line(label=title, x=tuple(map(float, steps)), y=values))
    if not lines:
        return None
    title = f"{task.title}: |validation loss - undisturbed|"
    return Plot(title=title, x_label="step", y_label=f"{task.unit}, at least {FLOOR:g}", y_log=True, lines=tuple(lines))


# ---- throughput ------------------------------------------------------------------------------------------------------

STAGES, REPLICAS, MICROS, CUT = 4, 4, 16, 3
CLOCKS = Clocks(tuple(Fraction(n, 20) for n in range(16, 25)), Fraction(1), Fraction(1, 5))
"""From 0.8 to 1.2 of the usual clock; a fifth of a stage's time waits for memory whatever the clock."""
LAYERS = (8, 16, 32)
ORDER = (ALL, RESHAPE, WHOLE, DROPPED)


@cache
def throughput(layers: int, stage: int) -> Mapping[str, Policy]:
    """One replica of one stage lost, by policy: a simulation that replays the pipeline's own orders."""
    members = [range(number * REPLICAS, (number + 1) * REPLICAS) for number in range(STAGES)]
    pipeline = Pipeline.of(even(layers, STAGES, 0, 0), members, MICROS, CUT)
    costs = Layers((Fraction(3 * STAGES, layers),) * layers)
    found = policies(pipeline, {stage: [0]}, costs, Machine(clocks=CLOCKS))
    return MappingProxyType({one.name: one for one in found})


def _throughputs() -> tuple[list[Claim], list[Row], Table, Plot]:
    found = {(layers, stage): throughput(layers, stage) for layers in LAYERS for stage in range(STAGES)}
    good = [_in_order([float(one[name].throughput) for name in ORDER]) for one in found.values()]
    whole = [float(one[ALL].throughput / one[WHOLE].throughput) for one in found.values()]
    dropped = [float(one[ALL].throughput / one[DROPPED].throughput) for one in found.values()]
    claim = Claim(
        name="throughput: every part adds",
        statement=f"simulated, {STAGES} stages of {REPLICAS} replicas, {MICROS} micro-batches, one replica lost: all "
        "axes >= reshape > orphans re-routed whole > the whole replica left out",
        holds=all(good),
        evidence=f"{sum(good)} of {len(good)} cases: {', '.join(map(str, LAYERS))} layers, each of the {STAGES} stages",
    )
    rows = [
        Row.over_seeds(
            f"simulated throughput, all axes / orphans re-routed whole, {len(whole)} cases",
            whole,
            "x",
            "1.35x (ReCycle)",
        ),
        Row.over_seeds(
            f"simulated throughput, all axes / whole replica left out, {len(dropped)} cases",
            dropped,
            "x",
            "1.60x (TorchFT)",
        ),
    ]
    names = (INTACT, DROPPED, WHOLE, RESHAPE, GRAPH, ALL)
    table = Table(
        title="Simulated throughput after the loss of one replica (1: nothing lost)",
        columns=("layers", "stage", *names[1:], "layers then", "clocks then"),
        rows=tuple(
            (
                layers,
                stage,
                *(round(float(one[name].throughput / one[INTACT].throughput), 4) for name in names[1:]),
                *_then(one[ALL]),
            )
            for (layers, stage), one in found.items()
        ),
        note="A micro-batch takes each stage 1 forward and 2 backward before the loss. Clocks go from "
        f"{float(CLOCKS.table[0]):g} to {float(CLOCKS.table[-1]):g} of the usual one; {float(CLOCKS.memory):.0%} of a "
        "stage's time does not depend on them.",
    )
    shown = LAYERS[1]
    lines = [
        Line(
            label=name,
            x=tuple(map(float, range(STAGES))),
            y=tuple(
                float(found[shown, s][name].throughput / found[shown, s][INTACT].throughput) for s in range(STAGES)
            ),
        )
        for name in (ALL, GRAPH, RESHAPE, WHOLE, DROPPED)
    ]
    plot = Plot(
        title=f"simulated throughput, {shown} layers (1: nothing lost)",
        x_label="stage that lost a replica",
        y_label="of the throughput before",
        lines=tuple(lines),
    )
    return [claim], rows, table, plot


def _in_order(rates: Sequence[float]) -> bool:
    best, *rest = rates
    return best >= rest[0] and all(a > b for a, b in pairwise(rest))


def _then(policy: Policy) -> tuple[str, str]:
    decision = policy.decision
    assert decision is not None
    clocks = " ".join(f"{float(clock):g}" for clock in decision.clocks)
    return " ".join(map(str, decision.pipeline.split.counts())), clocks


# ---- both ------------------------------------------------------------------------------------------------------------


def analyse(study: Study) -> Findings:
    """Rows, claims, the table of the simulation, and plots."""
    claims, rows, table, picture = _throughputs()
    plots = [picture]
    for task in TASKS:
        rows += _rows_of(study, task)
        claims += _claims_of(study, task)
        if (plot := _plot_of(study, task)) is not None:
            plots.append(plot)
    for name, title, unit in (
        ("redone", "steps redone in a run with real kills", "steps"),
        ("kept", "micro-batches that were not computed again", ""),
        ("recovery", "longest time from a kill to the next step", "s"),
    ):
        if found := _facts(study, name):
            rows.append(Row.over_seeds(title, found, unit))
    return Findings(rows=tuple(rows), claims=tuple(claims), tables=(table,), plots=tuple(plots))
