"""The analysis of the recipe `alst`: bytes of every arm, their order, and how far losses are from the baseline's."""

from __future__ import annotations

import statistics
from itertools import pairwise

from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, RunRecord, Study, Table

BASELINE = "checkpointed"
ARMS = {
    "nothing": "nothing, not even checkpoints",
    BASELINE: "checkpointed blocks",
    "loss": "+ loss in chunks",
    "sp": "+ Ulysses",
    "sp_tiles": "+ Ulysses, tiles",
    "sp_offload": "+ Ulysses, checkpoints away",
    "all": "all",
    "ring": "+ ring instead of Ulysses",
}
ORDER = ("nothing", BASELINE, "loss", "sp", "all")
CLOSE = 1e-4
MIB = 2**20


def values(record: RunRecord, name: str) -> list[float]:
    """What was logged after each committed step."""
    return [value for _, value in record.series.get(name, ()) if value is not None]


def most(study: Study, arm: str, name: str) -> list[float]:
    """Of each seed, the most bytes of any step."""
    return [max(values(trial.record, name), default=float("nan")) for trial in study.select(arm=arm)]


def gaps(study: Study, arm: str) -> list[float]:
    """Of each seed, the largest difference of losses from the baseline's at any step."""
    reference = {trial.seed: values(trial.record, "loss") for trial in study.select(arm=BASELINE)}
    found = []
    for trial in study.select(arm=arm):
        mine, other = values(trial.record, "loss"), reference.get(trial.seed, [])
        whole = mine and len(mine) == len(other)
        found.append(max(abs(a - b) for a, b in zip(mine, other, strict=True)) if whole else float("nan"))
    return found


def _ratios(study: Study, above: str, below: str, name: str) -> list[float]:
    return [a / b for a, b in zip(most(study, above, name), most(study, below, name), strict=True)]


def _share(record: RunRecord, ranks: int) -> int:
    """Bytes of one block's input on a rank, in float32."""
    settings = record.settings
    return int(settings["source"]["sequence_length"]) // ranks * int(settings["model"]["hidden_size"]) * 4


def _arms(study: Study) -> list[str]:
    return [arm for arm in ARMS if study.select(arm=arm)]


def _claims(study: Study) -> list[Claim]:
    arms, claims = _arms(study), []
    others = [arm for arm in arms if arm != BASELINE]
    worst = {arm: max(gaps(study, arm)) for arm in others}
    claims.append(
        Claim(
            name="the same losses",
            statement=f"every arm's losses stay within {CLOSE:g} of the baseline's",
            holds=bool(worst) and all(gap <= CLOSE for gap in worst.values()),
            evidence=", ".join(f"{ARMS[arm]} {gap:.1e}" for arm, gap in worst.items()),
        )
    )
    ordered = [arm for arm in ORDER if arm in arms]
    peaks = [max(most(study, arm, "peak_bytes")) / MIB for arm in ordered]
    claims.append(
        Claim(
            name="each part makes a step smaller",
            statement="peak bytes fall in the order of the published ablation",
            holds=len(peaks) > 1 and all(a > b for a, b in pairwise(peaks)),
            evidence=" > ".join(f"{ARMS[a]} {p:.1f} MiB" for a, p in zip(ordered, peaks, strict=True)),
        )
    )
    if "loss" in arms:
        kept = _ratios(study, BASELINE, "loss", "kept_bytes")
        claims.append(
            Claim(
                name="loss in chunks",
                statement="with the loss in chunks, what is kept between the passes is at least 3 times smaller",
                holds=min(kept) >= 3,
                evidence=f"{min(kept):.2f} times",
            )
        )
    if {"loss", "sp"} <= set(arms):
        claims += _divided(study)
    return claims


def _divided(study: Study) -> list[Claim]:
    claims = []
    ranks = int(study.select(arm="sp")[0].record.settings["objective"]["ranks"])
    kept = _ratios(study, "loss", "sp", "kept_bytes")
    claims.append(
        Claim(
            name="rows divided over ranks",
            statement=f"over {ranks} ranks each keeps {ranks} times less, within 15 %",
            holds=all(abs(ratio / ranks - 1) <= 0.15 for ratio in kept),
            evidence=f"{statistics.fmean(kept):.2f} times",
        )
    )
    if study.select(arm="sp_tiles"):
        peak = _ratios(study, "sp", "sp_tiles", "peak_bytes")
        claims.append(
            Claim(
                name="tiles",
                statement="feed-forwards in tiles make the peak smaller",
                holds=min(peak) > 1,
                evidence=f"{min(peak):.2f} times",
            )
        )
    if study.select(arm="sp_offload"):
        record = study.select(arm="sp_offload")[0].record
        wanted = (int(record.settings["model"]["layers"]) - 1) * _share(record, ranks)
        away = [a - b for a, b in zip(*(most(study, arm, "kept_bytes") for arm in ("sp", "sp_offload")), strict=True)]
        claims.append(
            Claim(
                name="checkpoints away",
                statement="what is kept falls by the inputs of all blocks but the last, within 5 %",
                holds=all(abs(found - wanted) <= 0.05 * wanted for found in away),
                evidence=f"{statistics.fmean(away) / MIB:.3f} MiB, {wanted / MIB:.3f} MiB of inputs",
            )
        )
    return claims


def analyse(study: Study) -> Findings:
    """Rows, claims, the table of the ablation and plots."""
    arms, rows = _arms(study), []
    for arm in arms:
        for name, what in (("kept_bytes", "kept between the passes"), ("peak_bytes", "peak")):
            rows.append(Row.over_seeds(f"{what}, {ARMS[arm]}", [b / MIB for b in most(study, arm, name)], "MiB"))
    table = Table(
        title="The ablation",
        columns=("switched on", "kept, MiB", "peak, MiB", "peak, times less than the baseline", "largest loss gap"),
        rows=tuple(
            (
                ARMS[arm],
                statistics.fmean(most(study, arm, "kept_bytes")) / MIB,
                statistics.fmean(most(study, arm, "peak_bytes")) / MIB,
                statistics.fmean(_ratios(study, BASELINE, arm, "peak_bytes")),
                max(gaps(study, arm)),
            )
            for arm in arms
        ),
        note="Of the rank that has most. Parameters, gradients kept for the optimizer and its moments are not counted.",
    )
    curves = []
    for arm in arms:
        losses = [values(trial.record, "loss") for trial in study.select(arm=arm)]
        steps = range(1, min(map(len, losses)) + 1)
        means = tuple(statistics.fmean(one[step - 1] for one in losses) for step in steps)
        curves.append(Line(label=ARMS[arm], x=tuple(steps), y=means))
    bars = tuple(
        Line(label=what, x=tuple(range(len(arms))), y=tuple(statistics.fmean(most(study, a, n)) / MIB for a in arms))
        for n, what in (("peak_bytes", "peak"), ("kept_bytes", "kept between the passes"))
    )
    plots = (
        Plot(title="bytes of a step, arms in the table's order", x_label="arm", y_label="MiB", lines=bars),
        Plot(title="training loss", x_label="step", y_label="nat/token", lines=tuple(curves)),
    )
    return Findings(rows=tuple(rows), claims=tuple(_claims(study)), tables=(table,), plots=plots)
