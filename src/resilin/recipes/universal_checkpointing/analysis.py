"""The analysis of the recipe `universal-checkpointing`: how far each resumed run goes from the uninterrupted one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, RunRecord, Study

REFERENCE = "uninterrupted"
TARGETS = {
    "tp1_pp1_dp1": "TP1 PP1 DP1",
    "tp2_pp1_dp3": "TP2 PP1 DP3",
    "pp4": "PP4",
    "zero3_dp5": "ZeRO-3, 5 ranks",
    "tp4": "TP4",
}
BASELINES = {"weights_only": "weights only", "naive_fused": "fused tensors joined in the order of ranks"}
CLOSE = 1e-4
TIMES = 10.0


def losses(record: RunRecord) -> dict[int, float]:
    """The training loss after each committed step."""
    return {step: value for step, value in record.series.get("loss", ()) if value is not None}


def resumed_at(record: RunRecord) -> int:
    """The first step that was computed in the second layout (a step of 1 is the first)."""
    stretches = record.settings["optimizer"]["stretches"]
    return int(stretches[1]["start"]) + 1


def deviations(study: Study, arm: str) -> dict[int, dict[int, float]]:
    """For each seed, |loss - uninterrupted| at each step from the first in the new layout."""
    reference = {trial.seed: losses(trial.record) for trial in study.select(arm=REFERENCE)}
    found = {}
    for trial in study.select(arm=arm):
        mine, other = losses(trial.record), reference.get(trial.seed, {})
        first = resumed_at(trial.record)
        found[trial.seed] = {step: abs(mine[step] - other[step]) for step in mine if step in other and step >= first}
    return found


def _means(study: Study, arm: str) -> list[float]:
    return [statistics.fmean(values.values()) for values in deviations(study, arm).values() if values]


def _jumps(study: Study, arm: str) -> list[float]:
    """The deviation at the first step in the new layout."""
    return [values[min(values)] for values in deviations(study, arm).values() if values]


def _claims(study: Study) -> list[Claim]:
    claims = []
    worst = 0.0
    for arm, title in TARGETS.items():
        means = _means(study, arm)
        worst = max([worst, *means])
        claims.append(
            Claim(
                name=f"goes on in {title}",
                statement=f"resumed in {title}, losses stay within {CLOSE:g} of the uninterrupted run's",
                holds=bool(means) and max(means) < CLOSE,
                evidence=f"mean |difference| {max(means, default=float('nan')):.2e} at most, {len(means)} seeds",
            )
        )
    weights = _means(study, "weights_only")
    claims.append(
        Claim(
            name="weights alone do not",
            statement=f"without the optimizer's state the deviation is more than {TIMES:g} times larger",
            holds=bool(weights) and min(weights) > TIMES * worst,
            evidence=f"{min(weights, default=0):.2e} at least, against {worst:.2e} at most, {len(weights)} seeds",
        )
    )
    jumps = _jumps(study, "naive_fused")
    others = [jump for arm in TARGETS for jump in _jumps(study, arm)]
    claims.append(
        Claim(
            name="joining fused tensors by rank does not",
            statement="with fused tensors joined in the order of ranks the loss jumps at once",
            holds=bool(jumps) and min(jumps) > TIMES * max(others, default=0.0) and min(jumps) > 0.05,
            evidence=f"{min(jumps, default=0):.3g} nat/token at least at the first step, {len(jumps)} seeds; "
            f"{max(others, default=0):.1e} at most when joined right",
        )
    )
    claims.append(_quick_save(study))
    return claims


def _seconds(study: Study, name: str) -> list[float]:
    values = [trial.record.value(f"mesh/{name}_s") for arm in TARGETS for trial in study.select(arm=arm)]
    return [value for value in values if value is not None]


def _quick_save(study: Study) -> Claim:
    save, gather = _seconds(study, "save"), _seconds(study, "gather")
    ratio = statistics.median(s / g for s, g in zip(save, gather, strict=True)) if save else float("nan")
    return Claim(
        name="saving is no slower than gathering",
        statement="every rank writing its own takes no longer than gathering at rank 0 and writing there",
        holds=bool(save) and ratio <= 1.0,
        evidence=f"{ratio:.2f} times the seconds, median of {len(save)} saves of a small model, 8 ranks in one process",
    )


def _line(label: str, values: Sequence[dict[int, float]]) -> Line:
    steps = sorted(set.intersection(*(set(v) for v in values))) if values else []
    return Line(label=label, x=tuple(steps), y=tuple(statistics.fmean(v[s] for v in values) for s in steps))


def analyse(study: Study) -> Findings:
    """Rows, claims and plots."""
    rows = []
    for arm, title in (TARGETS | BASELINES).items():
        rows.append(Row.over_seeds(f"mean |loss - uninterrupted|, {title}", _means(study, arm), "nat/token"))
        rows.append(Row.over_seeds(f"the same at the first step, {title}", _jumps(study, arm), "nat/token"))
    for name, title in (("save", "saving, every rank its own"), ("gather", "saving, gathered"), ("load", "loading")):
        rows.append(Row.over_seeds(title, _seconds(study, name), "s"))
    arms = {REFERENCE: "uninterrupted", **TARGETS, **BASELINES}
    curves = [_line(title, [losses(t.record) for t in study.select(arm=arm)]) for arm, title in arms.items()]
    gaps = [
        _line(title, [{s: max(d, 1e-9) for s, d in one.items()} for one in deviations(study, arm).values()])
        for arm, title in (TARGETS | BASELINES).items()
    ]
    plots = (
        Plot(title="training loss", x_label="step", y_label="nat/token", lines=tuple(curves)),
        Plot(
            title="|loss - uninterrupted| (at least 1e-9)", x_label="step", y_label="nat/token", y_log=True,
            lines=tuple(gaps),
        ),
    )  # fmt: skip
    return Findings(rows=tuple(rows), claims=tuple(_claims(study)), plots=plots)
