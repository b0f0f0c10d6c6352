"""The analysis of the recipe `scale`: how much of a long run is useful on 1,000 to 100,000 workers, way by way.

The runs are real: workers that are killed lose nothing (the precondition of everything that is simulated). Long runs
are simulated with the runtime's own scheduler (`resilin.planner.long_run`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from resilin.planner.hardware.find import load_cluster
from resilin.planner.long_run import Study as LongRun
from resilin.planner.long_run import study as play_all
from resilin.planner.long_run.choose import with_machine
from resilin.planner.long_run.draw import Failures, MachineFailures
from resilin.planner.long_run.laws import Law
from resilin.planner.long_run.optimum import expected
from resilin.planner.long_run.settings import (
    CheckpointSettings,
    ClusterSettings,
    JobSettings,
    StudySettings,
    WaySettings,
)
from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, Study, Table

MACHINE = "dgx-h100"
CLOCKS = tuple(1 + step / 100 for step in range(13))  # coarser ones would overshoot what they are to make up for
RATES = (0.25, 1.0, 4.0)
CLOSE = 0.05
"""Of Daly's expected time."""
WAYS: Mapping[str, WaySettings] = MappingProxyType(
    {
        "restart, Daly": WaySettings(use="restart", interval="daly", fewer=True),
        "spare replica": WaySettings(use="spares"),
        "torchft": WaySettings(use="torchft"),
        "Oobleck": WaySettings(use="oobleck"),
        "ReCycle": WaySettings(use="recycle"),
        "ElasWave": WaySettings(use="elaswave"),
        "Resilin": WaySettings(use="resilin"),
        "Resilin, fast sums": WaySettings(use="resilin-fast"),
    }
)
CLOSED = "restart at once"
"""Restarts on replaced machines: what a formula is known of."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What a preset simulates.

    Attributes:
        machines: numbers of them.
        days: of a run to which nothing happens.
        seeds: of failures.
    """

    machines: tuple[int, ...]
    days: float
    seeds: tuple[int, ...]


SCALES: Mapping[str, Scale] = MappingProxyType(
    {
        "cpu": Scale((128, 1252, 12500), 10.0, (0, 1, 2)),
        "gpu": Scale((128, 1252, 12500), 10.0, (0, 1, 2)),  # a GPU is of no use for it
        "paper": Scale((128, 1252, 12500), 60.0, (0, 1, 2, 3, 4)),
    }
)


def long_run(machines: int, days: float, seed: int, rate: float = 1.0) -> StudySettings:
    """The study: four stages, the devices of a machine share every layer, machines fail as Llama 3's did.

    Args:
        machines: that compute.
        days: of the run if nothing happens.
        seed: of the failures.
        rate: how often machines fail, over what is known of their kind.
    """
    kind = load_cluster(MACHINE)
    assert kind.failures is not None
    hours = kind.failures.device_hours / kind.node
    return with_machine(
        StudySettings(
            seed=seed,
            cluster=ClusterSettings(machines=machines, machine=MACHINE, devices=kind.node),
            job=JobSettings(
                stages=4,
                tensor=kind.node,
                micro_batches=16,
                micro_batch=4,
                layers=64,
                step_seconds=20.0,
                days=days,
                clocks=CLOCKS,
            ),
            checkpoint=CheckpointSettings(seconds=30.0),
            failures=Failures(machine=MachineFailures(mean_hours=hours / rate, repair=Law(mean_hours=24.0))),
            ways=dict(WAYS),
        )
    )


@cache
def simulated(scale: Scale) -> dict[tuple[int, float], tuple[LongRun, ...]]:
    """By machines and rate, a study for each seed: every size at the known rate, the middle size at all."""
    middle = scale.machines[len(scale.machines) // 2]
    cases = {(machines, 1.0) for machines in scale.machines} | {(middle, rate) for rate in RATES}
    return {
        case: tuple(play_all(long_run(case[0], scale.days, seed, case[1])) for seed in scale.seeds)
        for case in sorted(cases)
    }


def goodputs(studies: tuple[LongRun, ...], name: str) -> list[float]:
    """Of one way, for each seed."""
    return [study.line(name).outcome.goodput for study in studies]


@cache
def closed(scale: Scale) -> tuple[tuple[int, float, float], ...]:
    """(machines, simulated, expected) seconds of restarts on machines replaced at once, the mean over seeds."""
    found = []
    for machines in scale.machines:
        took, told = [], 0.0
        for seed in scale.seeds:
            settings = long_run(machines, scale.days, seed)
            assert settings.failures.machine is not None
            machine = settings.failures.machine.model_copy(update={"repair": Law(law="fixed", mean_hours=0.0)})
            changes = {
                "failures": Failures(machine=machine),
                "ways": {CLOSED: WaySettings(use="restart", interval="daly")},
            }
            made = play_all(settings.model_copy(update=changes))
            line = made.line(CLOSED)
            took.append(line.outcome.seconds)
            saves, apart = settings.checkpoint, 1 / settings.failures.rate(machines)
            told = expected(made.plain, line.course.interval, saves.seconds, saves.restart_seconds, apart)
        found.append((machines, statistics.fmean(took), told))
    return tuple(found)


def _bits(study: Study) -> tuple[int, int, int]:
    """Seeds with the undisturbed run's losses and weights, seeds, workers killed."""
    plain = {trial.seed: trial.record for trial in study.select(arm="undisturbed")}
    same, killed, count = 0, 0, 0
    for trial in study.select(arm="killed"):
        other = plain.get(trial.seed)
        count += 1
        killed += int(trial.record.final.get("cluster/killed") or 0)
        same += bool(
            other is not None
            and trial.record.weights
            and trial.record.weights == other.weights
            and trial.record.series.get("loss") == other.series.get("loss")
        )
    return same, count, killed


def _claims(study: Study, scale: Scale) -> list[Claim]:
    claims = []
    same, count, killed = _bits(study)
    if count:
        claims.append(
            Claim(
                name="a kill loses nothing",
                statement="real workers that are killed: every loss and the weights are the undisturbed run's",
                holds=same == count and killed > 0,
                evidence=f"{same} of {count} seeds; {killed} workers killed",
            )
        )
    off = {machines: took / told - 1 for machines, took, told in closed(scale)}
    claims.append(
        Claim(
            name="restarts are Daly's",
            statement=f"restarts on machines that are replaced at once take Daly's expected time, within {CLOSE:.0%}",
            holds=all(abs(part) <= CLOSE for part in off.values()),
            evidence=", ".join(f"{8 * machines:,} workers {part:+.2%}" for machines, part in off.items()),
        )
    )
    studies = simulated(scale)
    pairs = (
        ("ElasWave", "restart, Daly", "all axes against restarts at Daly's interval"),
        ("ElasWave", "torchft", "all axes against whole replicas left out"),
        ("ElasWave", "ReCycle", "all axes against orphans re-routed whole"),
        ("Resilin, fast sums", "torchft", "an elastic run with fast sums against whole replicas left out"),
    )
    for ours, theirs, what in pairs:
        won, ratios = 0, []
        for machines in scale.machines:
            found = studies[machines, 1.0]
            mine, other = goodputs(found, ours), goodputs(found, theirs)
            won += sum(a > b for a, b in zip(mine, other, strict=True))
            ratios.append(f"{8 * machines:,} workers {statistics.fmean(mine) / statistics.fmean(other):.3f}x")
        claims.append(
            Claim(
                name=f"{ours} and {theirs}",
                statement=f"{what}: more of the run is useful, at every size and with every seed",
                holds=won == len(scale.machines) * len(scale.seeds),
                evidence=f"{won} of {len(scale.machines) * len(scale.seeds)} runs; " + ", ".join(ratios),
            )
        )
    gaps = [
        statistics.fmean(goodputs(studies[machines, 1.0], "ElasWave"))
        - statistics.fmean(goodputs(studies[machines, 1.0], "restart, Daly"))
        for machines in scale.machines
    ]
    claims.append(
        Claim(
            name="the gap grows",
            statement="what restarts lose against going on from memory grows with the number of workers",
            holds=gaps == sorted(gaps),
            evidence=", ".join(f"{gap:.3f}" for gap in gaps),
        )
    )
    return claims


def _table(scale: Scale) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    for machines in scale.machines:
        found = simulated(scale)[machines, 1.0]
        for name in WAYS:
            lines = [study.line(name) for study in found]
            outcomes = [line.outcome for line in lines]
            whole = statistics.fmean(outcome.seconds for outcome in outcomes)
            shares = [
                statistics.fmean(getattr(outcome, part) for outcome in outcomes) / whole
                for part in ("slower", "again", "saving", "stopped")
            ]
            rows.append(
                (
                    8 * machines,
                    name,
                    statistics.fmean(goodputs(found, name)),
                    whole / 86400,
                    *shares,
                    statistics.fmean(line.cost for line in lines) / 1e6,
                    statistics.fmean(line.energy for line in lines) / 1e6,
                )
            )
    columns = ("workers", "way", "goodput", "days", "slower", "again", "saving", "stopped", "million USD", "GWh")
    note = (
        f"{scale.days:g} days if nothing happened; 4 stages, 16 micro-batches of 4 for a replica, steps of 20 s, "
        "checkpoints of 30 s; prices, watts, restarts and how often machines fail as in the description "
        f"{MACHINE}; repairs take 24 hours on the mean, going on from memory 10 s for every way"
    )
    return Table(title="Simulated: where the time goes", columns=columns, rows=tuple(rows), note=note)


def _plots(scale: Scale) -> tuple[Plot, ...]:
    studies = simulated(scale)
    middle = scale.machines[len(scale.machines) // 2]

    def line(name: str, cases: list[tuple[float, tuple[int, float]]]) -> Line:
        values = [goodputs(studies[case], name) for _, case in cases]
        spread = tuple(statistics.stdev(one) if len(one) > 1 else None for one in values)
        return Line(label=name, x=tuple(x for x, _ in cases), y=tuple(map(statistics.fmean, values)), spread=spread)

    sizes: list[tuple[float, tuple[int, float]]] = [(8.0 * machines, (machines, 1.0)) for machines in scale.machines]
    rates: list[tuple[float, tuple[int, float]]] = [(rate, (middle, rate)) for rate in RATES]
    return (
        Plot(
            title="Goodput against scale",
            x_label="workers",
            y_label="goodput",
            x_log=True,
            lines=tuple(line(name, sizes) for name in WAYS),
        ),
        Plot(
            title=f"Goodput against the rate of failure, {8 * middle:,} workers",
            x_label="failures over those known",
            y_label="goodput",
            x_log=True,
            lines=tuple(line(name, rates) for name in WAYS),
        ),
    )


def analyse(study: Study) -> Findings:
    """Claims, goodput of every way at every size, where the time goes, and pictures."""
    scale = SCALES[study.preset]
    rows = [
        Row.over_seeds(f"simulated goodput, {8 * machines:,} workers, {name}", goodputs(studies, name))
        for (machines, rate), studies in simulated(scale).items()
        if rate == 1.0
        for name in WAYS
    ]
    recovery = [
        value
        for trial in study.select(arm="killed")
        if (value := trial.record.final.get("cluster/recovery")) is not None and math.isfinite(value)
    ]
    if recovery:
        rows.append(Row.over_seeds("measured: longest time from a kill to the next step, 4 workers", recovery, "s"))
    return Findings(
        rows=tuple(rows),
        claims=tuple(_claims(study, scale)),
        tables=(_table(scale),),
        plots=_plots(scale),
    )
