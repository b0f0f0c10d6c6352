"""The analysis of the recipe `se-moe`: what tiers cost, and what reading ahead saves."""

from __future__ import annotations

import random
import statistics

from resilin.memory import CachePolicy
from resilin.parallel.task_allocation import allocate
from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, RunRecord, Study

RESIDENT = "resident"
TIERED = {
    "memory": "all states in host memory",
    "off": "cache of a quarter, nothing read ahead",
    "ahead": "cache of a quarter, next layer read ahead",
    "off_lru": "least recently used leaves, nothing read ahead",
    "ahead_lru": "least recently used leaves, next layer read ahead",
}
ARMS = {RESIDENT: "no tiers: experts are parameters like any other", **TIERED}
SHORTER = 0.2
WARM = 3
"""Steps that are not timed: the first ones fill the cache."""
REQUESTS, CACHES = 20_000, (8, 16, 32)
TASKS, ONE_EACH, BALANCED = (512.0, 256.0, 128.0, 128.0), 4, 8


def per_step(record: RunRecord, name: str) -> list[float]:
    """A logged quantity of every step after the first ones."""
    return [value for step, value in record.series.get(name, ()) if value is not None and step > WARM]


def _medians(study: Study, arm: str, name: str) -> list[float]:
    found = [per_step(trial.record, name) for trial in study.select(arm=arm)]
    return [statistics.median(values) for values in found if values]


def _last(study: Study, arm: str, name: str) -> list[float]:
    values = [trial.record.value(name) for trial in study.select(arm=arm)]
    return [value for value in values if value is not None]


def _equal(study: Study) -> Claim:
    wanted = {trial.seed: _outcome(trial.record) for trial in study.select(arm=RESIDENT)}
    others = [trial for trial in study.trials if trial.arm != RESIDENT]
    unlike = [f"{trial.arm}, seed {trial.seed}" for trial in others if _outcome(trial.record) != wanted[trial.seed]]
    return Claim(
        name="tiers change nothing",
        statement="every loss and every final weight of every run with tiers is that of the run without, to the bit",
        holds=bool(others) and not unlike,
        evidence=f"{len(others) - len(unlike)} of {len(others)} runs are equal"
        + (f"; not {unlike[0]}" if unlike else ""),
    )


def _outcome(record: RunRecord) -> tuple[object, str]:
    return record.series.get("loss"), record.weights


def _less_memory(study: Study) -> Claim:
    """Bytes are counted, of what experts take: weights, gradients and two moments."""
    resident = [16 * _expert_parameters(trial.record) for trial in study.select(arm=RESIDENT)]
    tiered = [
        sum(trial.record.value(f"experts/{tier}_bytes") or 0.0 for tier in ("host", "gradient", "device"))
        for trial in study.select(arm="ahead_lru")
    ]
    return Claim(
        name="less memory",
        statement="with a cache of a quarter, experts take less than half the bytes of host memory and device that "
        "they take without tiers",
        holds=bool(tiered) and all(mine < 0.5 * theirs for mine, theirs in zip(tiered, resident, strict=True)),
        evidence="; ".join(f"{a / 1e6:.1f} MB against {b / 1e6:.1f} MB" for a, b in zip(tiered, resident, strict=True)),
    )


def _expert_parameters(record: RunRecord) -> int:
    model = record.settings["model"]
    moe = model["moe"]
    matrices = 3 if model["gated"] else 2
    layers = model["layers"] - len(moe["dense_layers"])
    return int(layers * moe["experts"] * matrices * model["hidden_size"] * moe["expert_size"])


def zipf_hit_rate(policy: CachePolicy) -> float:
    """Of requests for 64 experts whose popularity goes with 1 / rank."""
    weights = [1 / (1 + place) for place in range(64)]
    requests = random.Random(0).choices(range(64), weights, k=REQUESTS)
    return sum(policy.get((0, expert)).hit for expert in requests) / REQUESTS


def _popular() -> Claim:
    found = [
        (zipf_hit_rate(CachePolicy(size, period=500)), zipf_hit_rate(CachePolicy(size, kind="lru"))) for size in CACHES
    ]
    return Claim(
        name="frequency beats recency",
        statement="where few are popular (Zipf), dropping the least frequently used one hits more often than LRU",
        holds=all(lfu > lru for lfu, lru in found),
        evidence="; ".join(f"{n} slots: {a:.2f} against {b:.2f}" for n, (a, b) in zip(CACHES, found, strict=True)),
    )


def _claims(study: Study) -> list[Claim]:
    stall, step = ({arm: _medians(study, arm, name) for arm in TIERED} for name in ("experts/stall_s", "seconds"))
    pairs = list(zip(stall["ahead"], stall["off"], strict=True))
    saved = [1 - ahead / off for ahead, off in zip(step["ahead"], step["off"], strict=True)]
    hits = list(zip(_last(study, "off", "experts/hit_rate"), _last(study, "off_lru", "experts/hit_rate"), strict=True))
    one_each, balanced = (allocate(TASKS, count).utilisation(TASKS) for count in (ONE_EACH, BALANCED))
    return [
        _equal(study),
        _less_memory(study),
        Claim(
            name="reading ahead hides the disk",
            statement="a step waits less for the disk when the next layer's experts are read ahead",
            holds=bool(pairs) and all(ahead < off for ahead, off in pairs),
            evidence="; ".join(f"{ahead:.3f} s against {off:.3f} s" for ahead, off in pairs),
        ),
        Claim(
            name="steps are shorter",
            statement=f"and is at least {SHORTER:.0%} shorter",
            holds=bool(saved) and min(saved) >= SHORTER,
            evidence=f"{', '.join(f'{one:.0%}' for one in saved)} shorter, each the median of its steps",
        ),
        _popular(),
        Claim(
            name="frequency beats recency in training",
            statement="in these runs, where forward, backward and update each ask, the hit rate is no lower than LRU's",
            holds=bool(hits) and all(lfu >= lru for lfu, lru in hits),
            evidence="; ".join(f"{lfu:.3f} against {lru:.3f}" for lfu, lru in hits),
        ),
        Claim(
            name="balanced tasks",
            statement="four tasks of 512, 256, 128 and 128 samples use 8 devices better than 4 with one task each",
            holds=balanced > one_each,
            evidence=f"utilisation {one_each:.2f} and {balanced:.2f} in the model of a step's bound",
        ),
    ]


def analyse(study: Study) -> Findings:
    """Rows, claims and plots."""
    rows = []
    for arm, title in ARMS.items():
        rows.append(Row.over_seeds(f"seconds of a step: {title}", _medians(study, arm, "seconds"), "s"))
        if arm == RESIDENT:
            continue
        rows.append(Row.over_seeds(f"of which stalled: {title}", _medians(study, arm, "experts/stall_s"), "s"))
        rows.append(Row.over_seeds(f"hit rate: {title}", _last(study, arm, "experts/hit_rate")))
        megabytes = [size / 1e6 for size in _last(study, arm, "experts/host_bytes")]
        rows.append(Row.over_seeds(f"host memory: {title}", megabytes, "MB"))
    rows.append(Row.over_seeds("share of experts that a step uses", _last(study, "memory", "experts/active")))
    lines = []
    for arm, title in ARMS.items():
        runs = [dict(trial.record.series.get("seconds", ())) for trial in study.select(arm=arm)]
        steps = sorted(set.intersection(*map(set, runs))) if runs else []
        means = tuple(statistics.fmean(float(run[step] or 0.0) for run in runs) for step in steps)
        lines.append(Line(label=title, x=tuple(steps), y=means))
    plot = Plot(title="seconds of a step", x_label="step", y_label="s", lines=tuple(lines))
    return Findings(rows=tuple(rows), claims=tuple(_claims(study)), plots=(plot,))
