"""The planner of layouts: what it predicts beside published runs, and beside runs of its own settings on this machine.

What is measured:
- published runs (Megatron-LM's tables and figures, Megatron Core's on H100, TorchTitan's, nanotron's, Frontier's),
  predicted from their machines' constants with one share of peak for each machine and its software, which comes from
  one row of its tables that is not counted: the median error, each table's, and how well each table's order is kept;
- peak memory of real runs here, of one to four processes, beside what was predicted for each of them (a run's memory
  beyond what a process of Resilin has before it builds a model);
- seconds a step of real runs here with two to eight processes, beside predictions from measurements of this machine
  (as `resilin plan calibrate` makes them) and one common factor, which comes from the first of the runs.

    resilin bench run planner
    resilin bench run planner --only published
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from planner_rows.layouts import timed, weighed
from planner_rows.runs import measure, work
from planner_rows.scores import ordered, spearman
from resilin.bench.results import Report, Row
from resilin.planner.calibrate import calibrate
from resilin.planner.hardware import Cluster, load_cluster
from resilin.planner.published import Predicted, load_tables, predict_all

KINDS = ("published", "memory", "time")
NOISE = 0.05
"""At least, of a step's time from one run to the next."""
LARGEST_ERROR, LARGEST_TIME_ERROR, LEAST_ORDER = 10.0, 15.0, 0.9


def percent(values: list[float]) -> float:
    return 100 * statistics.median(map(abs, values))


def error_row(name: str, found: list[float], aim: float | None, runs: dict[str, list[float]], note: str = "") -> Row:
    """Of the median of so many relative errors."""
    aimed = {} if aim is None else {"peer": aim, "peer_name": "the aim", "target": 1.0}
    return Row(name=name, unit="%", ours=percent(found), better="lower", runs=runs, note=note, **aimed)


def order_row(name: str, value: float, runs: dict[str, list[float]] | None = None) -> Row:
    aimed = {"peer": LEAST_ORDER, "peer_name": "the aim", "target": 1.0}
    return Row(name=name, unit="Spearman", ours=value, runs=runs or {}, **aimed)


def both(found: list[Predicted]) -> dict[str, list[float]]:
    return {one.row.name + ("" if one.counted else " (calibrates)"): [one.row.value, one.value] for one in found}


def published() -> list[Row]:
    found, shares = predict_all(load_tables())
    by_table: dict[str, list[Predicted]] = defaultdict(list)
    for one in found:
        by_table[one.table.name].append(one)
    counted = [one for one in found if one.counted]
    calibration = {f"{machine}, {stack}": [share] for (machine, stack), share in shares.items()}
    rows = [
        error_row(
            f"published runs, {len(counted)} rows: median error of the prediction",
            [one.error for one in counted],
            LARGEST_ERROR,
            calibration,
            "runs: the calibrated share of peak of each machine and system",
        )
    ]
    orders = {}
    for name, table in by_table.items():
        errors = [one.error for one in table if one.counted]
        if errors:  # of a table all of whose rows calibrate nothing is predicted
            rows.append(error_row(f"{name}: median error", errors, None, both(table), "runs: [published, predicted]"))
        if len(table) > 2:
            orders[name] = [spearman([one.row.value for one in table], [one.value for one in table])]
    rows.append(
        order_row(
            "published runs: order within a table, median", statistics.median(o for (o,) in orders.values()), orders
        )
    )
    weighed_rows = [one for one in found if one.memory_error is not None]
    rows.append(
        error_row(
            f"published runs, {len(weighed_rows)} rows: median error of the peak memory",
            [one.memory_error for one in weighed_rows if one.memory_error is not None],
            LARGEST_ERROR,
            {f"{one.table.name}: {one.row.name}": [one.row.gib, one.step.memory.total / 2**30] for one in weighed_rows},
            "runs: GiB, [published, predicted]",
        )
    )
    return rows


def memory(cluster: Cluster) -> list[Row]:
    """A run's peak is that of its fullest worker."""
    runs = {}
    for case in weighed():
        found = measure(case.settings(cluster, 2), __file__, give_back=True)
        runs[case.name] = [max(found.memory) / 2**20, max(case.memory()) / 2**20]
        print(f"{case.name}: {runs[case.name][0]:.0f} MiB measured, {runs[case.name][1]:.0f} predicted", flush=True)
    errors = [predicted / measured - 1 for measured, predicted in runs.values()]
    return [
        error_row(
            f"peak memory of {len(runs)} runs here: median error",
            errors,
            LARGEST_ERROR,
            runs,
            "MiB, [measured, predicted]",
        ),
        Row(
            name=f"peak memory of {len(runs)} runs here: largest error",
            unit="%",
            ours=100 * max(map(abs, errors)),
            better="lower",
        ),
    ]


def times(rounds: int, steps: int, layouts: int | None) -> list[Row]:
    cluster = calibrate(Path(tempfile.gettempdir()), tell=lambda line: print(line, flush=True))
    cases = timed()[:layouts]
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for case in cases:
            taken[case.name].append(measure(case.settings(cluster, steps), __file__, give_back=False).median)
            print(f"{case.name}: {taken[case.name][-1]:.3f} s", flush=True)
    measured = {name: statistics.median(each) for name, each in taken.items()}
    bare = {case.name: case.predicted(cluster).seconds for case in cases}
    first = cases[0].name
    factor = measured[first] / bare[first]
    told = {name: seconds * factor for name, seconds in bare.items()}
    counted = [name for name in told if name != first]
    errors = [told[name] / measured[name] - 1 for name in counted]
    runs = {name + (" (calibrates)" if name == first else ""): [measured[name], told[name]] for name in told}
    values, predicted = [measured[n] for n in counted], [told[n] for n in counted]
    noise = max(NOISE, statistics.median(max(each) / min(each) - 1 for each in taken.values()))
    share, pairs = ordered(values, predicted, noise)
    workers = sorted({case.plan.degrees.workers for case in cases})
    many = f"{', '.join(map(str, workers[:-1]))} and {workers[-1]} processes"
    within = 100 * sum(abs(error) * 100 <= LARGEST_TIME_ERROR for error in errors) / len(errors)
    return [
        order_row(f"step time of {len(counted)} layouts here, {many}: order", spearman(values, predicted)),
        Row(
            name=f"step time of {len(counted)} layouts here: pairs apart by more than noise that are told in order",
            unit="%",
            ours=100 * share,
            note=f"{pairs} pairs of layouts whose times differ by more than {noise:.0%}",
        ),
        error_row(
            f"step time of {len(counted)} layouts here: median error",
            errors,
            LARGEST_TIME_ERROR,
            runs,
            f"seconds, [measured, predicted]; measured medians of {rounds} runs; all predictions times {factor:.3f}",
        ),
        Row(
            name=f"step time of {len(counted)} layouts here: within {LARGEST_TIME_ERROR:.0f}%",
            unit="%",
            ours=within,
            peer=100.0,
            peer_name="the aim",
            target=1.0,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--rounds", type=int, default=2, help="of all timed layouts, one after another")
    parser.add_argument("--steps", type=int, default=7, help="of a timed run; the first two are not counted")
    parser.add_argument("--layouts", type=int, default=None, help="time only so many, for trying it out")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--settings", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--give-back", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.settings:
        work(options.settings, options.folder, give_back=options.give_back)
        return
    rows: list[Row] = []
    for kind, take in (
        ("published", published),
        ("memory", lambda: memory(load_cluster("laptop"))),
        ("time", lambda: times(options.rounds, options.steps, options.layouts)),
    ):
        if kind in options.only:
            began = time.perf_counter()
            rows += take()
            print(f"{kind}: {time.perf_counter() - began:.0f} s", flush=True)
    for row in rows:
        print(f"{row.name}: {row.ours:.3g} {row.unit}" + ("" if row.met is None else f" (aim met: {row.met})"))
    settings = {"only": list(options.only), "rounds": options.rounds, "steps": options.steps}
    print(f"wrote {Report.of('planner', settings, rows).write(options.output)}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
