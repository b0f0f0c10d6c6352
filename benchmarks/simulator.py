"""The simulator of long runs: how quick it is, and how near closed forms, full replays and real runs with kills.

- Events a second of one core (of processor time, so that other work does not count): a trace of a million events on
  100,096 workers, played by several ways; the aim is a minute.
- Restarts against Daly's expected time, failures against their law.
- A slice of the pipeline, as large clusters are timed with, against replaying every member.
- Real workers: one run of which two are killed gives the times of steps and recoveries; with these another run, killed
  at other steps, is simulated and compared with what it took. The run of `benchmarks/results/recovery.json` likewise.

    resilin bench run simulator
    resilin bench run simulator --kills ""      without real runs
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from recovery import AFTER, tree
from resilin.bench.results import Report, Row, results_name
from resilin.cluster.axes import Assignment, Layers, Pipeline, Rules, decide
from resilin.cluster.local import worker_command
from resilin.config import parse_settings
from resilin.planner.budget import StepTimes
from resilin.planner.long_run import Course, Trace, play
from resilin.planner.long_run.draw import Failures, MachineFailures, draw
from resilin.planner.long_run.laws import Law
from resilin.planner.long_run.optimum import daly, expected
from resilin.planner.long_run.pace import CUT, Job, MeasuredPaces, ScheduledPaces
from resilin.planner.long_run.restart import Restart
from resilin.planner.long_run.settings import ClusterSettings, JobSettings, StudySettings, WaySettings
from resilin.planner.long_run.stages import Habits, Sharing
from resilin.planner.long_run.study import Ways
from resilin.run.blows import Blow
from resilin.run.chaos import run_told
from resilin.run.chaos_report import Told
from resilin.run.settings import RunSettings

MACHINES, DAY = 12512, 86400.0
EVENTS, MINUTE = 1_000_000, 60.0


def speeds(rounds: int) -> list[Row]:
    """A million beginnings and ends of failures, and what it takes to play them, the scheduler's answers included."""
    laws = Failures(machine=MachineFailures(mean_hours=600.0, repair=Law(mean_hours=6.0)))
    seconds = EVENTS / 2 * 606 * 3600 / MACHINES
    began = time.process_time()
    trace = draw(laws, MACHINES, seconds, seed=0)
    drawn = time.process_time() - began
    rows = [
        Row(
            name=f"{8 * MACHINES:,} workers: drawing {2 * len(trace):,} beginnings and ends of failures",
            unit="s", ours=drawn, peer=MINUTE, peer_name="the aim", better="lower", target=1.0,
        )
    ]  # fmt: skip
    settings = StudySettings(
        cluster=ClusterSettings(machines=MACHINES),
        job=JobSettings(
            stages=8, tensor=8, micro_batches=16, micro_batch=4, layers=64, step_seconds=20, days=2 * seconds / DAY
        ),
    )
    for use in ("restart", "torchft", "oobleck", "recycle", "elaswave", "resilin"):
        took, events, goodput = [], 0, 0.0
        for _ in range(rounds):
            ways = Ways(settings)
            began = time.process_time()
            way = WaySettings(use=use, fewer=use == "restart", interval=600.0)
            found = play(ways.make(way), trace, Course(settings.steps, 20, 600.0, 5.0, seconds))
            took.append(time.process_time() - began)
            events, goodput = found.events, found.goodput
        rows.append(
            Row(
                name=f"{8 * MACHINES:,} workers, {events:,} events, {use}", unit="events/s",
                ours=events / statistics.median(took), peer=EVENTS / MINUTE, peer_name="the aim", target=1.0,
                runs={"ours": [events / one for one in took]}, note=f"goodput {goodput:.4f}",
            )
        )  # fmt: skip
    return rows


def closed_forms() -> list[Row]:
    """Restarts of one run so long that failures average out; numbers of failures."""
    save, restart, apart = 60.0, 300.0, 4000.0
    laws = Failures(machine=MachineFailures(mean_hours=4 * apart / 3600, repair=Law(law="fixed", mean_hours=0)))
    work = 3e7
    trace = draw(laws, 4, 2 * work, seed=1)
    mean = trace.seconds / apart
    rows = [
        _within("exponential failures: their number against the law's", abs(len(trace) / mean - 1), 3 / math.sqrt(mean))
    ]
    for name, interval in (("Daly's interval", daly(save, apart)), ("300 s", 300.0), ("3,000 s", 3000.0)):
        found = play(Restart(4, 1, None, 1, restart, save), trace, Course(work, 1.0, interval, save))
        error = abs(found.seconds / expected(work, interval, save, restart, apart) - 1)
        what = f"restarts, a checkpoint of 60 s every {name}, {found.losses:,} failures: time against Daly's expected"
        rows.append(_within(what, error, 0.02))
    quiet = play(Restart(4, 1, None, 1, restart, save), Trace.of(4, 1.0, []), Course(work, 1.0))
    rows.append(_within("nothing happens: time against the steps'", abs(quiet.seconds / work - 1), 1e-9))
    return rows


def _within(name: str, error: float, aim: float) -> Row:
    return Row(
        name=name, unit="relative", ours=max(error, 1e-15), peer=aim, peer_name="the aim", better="lower", target=1.0
    )


def slices() -> list[Row]:
    """The loss of one replica, of two, and of some of every stage."""
    rows = []
    cases: tuple[tuple[str, tuple[Assignment, ...]], ...] = (
        ("cut", CUT),
        ("whole", ("whole",)),
        ("in runs", ("runs",)),
    )
    for name, assignments in cases:
        errors = []
        for stages, replicas, ticks in ((2, 8, 8), (4, 8, 8)):
            job = Job(Layers((1.0,) * (8 * stages)), stages, replicas, ticks, 8)
            paces = ScheduledPaces(job, assignments, graph=True)
            paces._small = lambda slow: False  # type: ignore[method-assign]
            full = [[100 * stage + one for one in range(replicas)] for stage in range(stages)]
            now = Pipeline.of(job.split, full, job.micros, job.micro)
            none = [0] * (stages - 1)
            for lost in ((1, *none), (*none, 1), (2, *none), (1,) * stages, (3,) * stages):
                members = tuple(replicas - count for count in lost)
                numbers = [numbers[:count] for numbers, count in zip(full, members, strict=True)]
                told = decide(now, numbers, job.layers, rules=Rules(assignments=assignments))
                pace = paces.of(members, (1.0,) * stages)
                assert pace is not None
                errors.append(pace.seconds / float(told.after.seconds) - 1)
        for word, error, aim in (
            ("median", statistics.median(map(abs, errors)), 0.02),
            ("largest", max(map(abs, errors)), 0.1),
        ):
            what = f"micro-batches {name}: a step by a slice against all members, {word} of {len(errors)} losses"
            rows.append(_within(what, error, aim))
    return rows


def run(args: argparse.Namespace, folder: Path, text: Path, kills: list[int]) -> Told:
    """Real workers, of whom one is killed after each of some steps."""
    made = tree(args, text) | {"parallel": {"workers": args.workers}, "cluster": {"elastic": True}}
    settings = parse_settings(RunSettings, made, "benchmark")
    told = run_told(settings, folder, worker_command(), [Blow(step, AFTER, "kill", 0.5) for step in kills])
    if told.ended:
        raise SystemExit(f"the elastic run ended: {told.ended}")
    return told


def learned(told: Told, workers: int) -> tuple[StepTimes, float]:
    """Seconds of a step by number of members, and seconds of a recovery beyond one step."""
    falls = [fell.time for fell in told.blows]
    ends = [*falls, math.inf]
    points, beyond, begin = [], [], -math.inf
    for lost, end in enumerate(ends):
        mine = [at for at in told.times if begin < at <= end]
        points.append((float(workers - lost), statistics.median(b - a for a, b in pairwise(mine))))
        if begin > -math.inf:
            beyond.append(max(mine[0] - begin - points[-1][1], 0.0))
        begin = end
    return StepTimes(tuple(sorted(points))), statistics.fmean(beyond)


def simulated(times: StepTimes, stop: float, workers: int, falls: list[float], steps: int) -> float:
    """Seconds from the first step's end to the last one's."""
    way = Sharing(workers, 1, 1, MeasuredPaces(times), Habits(stop, 0.0))
    events = [(at, "fail", machine, math.inf, 0.0, 1.0) for machine, at in enumerate(falls)]
    usual = times(float(workers))
    return play(way, Trace.of(workers, 1e9, events), Course(steps - 1, usual)).seconds


def real(args: argparse.Namespace, folder: Path) -> list[Row]:
    """A run that teaches, and another that is foretold."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 2000)
    first, second = ([int(step) for step in part.split(",")] for part in args.kills.split(";"))
    times, stop = learned(run(args, folder / "first", text, first), args.workers)
    told = run(args, folder / "second", text, second)
    falls = [fell.time - told.times[0] for fell in told.blows]
    took, foretold = told.times[-1] - told.times[0], simulated(times, stop, args.workers, falls, args.steps)
    what = f"{args.workers} real workers, one killed after steps {second} of {args.steps}"
    return [
        Row(
            name=f"{what}: simulated, with times of another run", unit="s", ours=foretold, peer=took,
            peer_name="measured", better="lower", runs={"steps": [s for _, s in times.measured], "stop": [stop]},
        ),
        _within(f"{what}: simulated against measured", abs(foretold / took - 1), 0.1),
    ]  # fmt: skip


def recorded(file: Path) -> list[Row]:
    """The run of the benchmark `recovery` in which one of four is killed after every twenty of sixty steps."""
    rows = json.loads(file.read_text())["rows"]
    whole = next(row for row in rows if "one killed after every 20 of 60 steps" in row["name"])
    beyond = next(row for row in rows if "what is more than one step" in row["name"])["runs"]["ours"]
    recovery = next(row for row in rows if "from a SIGKILL to the next step" in row["name"])["runs"]["ours"]
    before = whole["peer"] / 59
    after = statistics.fmean(took - more for took, more in zip(recovery, beyond, strict=True))
    times = StepTimes(((2.0, after), (4.0, before)))
    kills = [20 * before + AFTER - before, 40 * before + AFTER - before]
    found = simulated(times, statistics.fmean(beyond), 4, kills, 60)
    what = "benchmarks/results/recovery.json, 4 workers, one killed after every 20 of 60 steps"
    return [_within(f"{what}: simulated against measured", abs(found / whole["ours"] - 1), 0.1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", default="20,40;10,30", help="after which steps, of the two real runs; empty: none")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows = [*closed_forms(), *slices(), *recorded(Path(__file__).parent / "results" / "recovery.json")]
    rows += speeds(args.rounds)
    if args.kills:
        with tempfile.TemporaryDirectory() as folder:
            rows += real(args, Path(folder))
    for row in rows:
        peer = "" if row.peer is None else f", {row.peer_name} {row.peer:.3g}"
        print(
            f"{row.name}: {row.ours:.3g} {row.unit}{peer}{'' if row.met is None else ' met' if row.met else ' NOT met'}"
        )
    settings = {name: getattr(args, name) for name in ("rounds", "workers", "steps", "kills")}
    print(f"wrote {Report.of(results_name('simulator', 'cpu'), settings, rows).write(args.output)}")


if __name__ == "__main__":
    main()
