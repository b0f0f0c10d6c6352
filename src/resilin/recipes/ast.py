"""The analysis of the recipe `ast`: held-out losses by arm, what of the one-shot gap each closes, the flip rates.

All arms of a seed start from the same dense model. The one-shot loss is that of a sparse arm before its first step, the
dense loss that of the arm `dense` before its first step; losses are the plain cross-entropy, whatever was trained on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, RunRecord, Study, Trial

TITLES = {
    "dense": "dense, trained on",
    "fixed_ce": "one-shot mask kept, labels only",
    "fixed_kd": "one-shot mask kept, teacher",
    "moving": "mask moves without decay, teacher",
    "static": "constant decay, teacher",
    "ast_ce": "AST, labels only",
    "ast": "AST",
    "ast_slorb": "AST with SLoRB",
}
PAPER = {"fixed_kd": "32.93 (perplexity)", "static": "32.84", "ast_ce": "39.29", "ast": "32.23", "ast_slorb": "31.13"}
NEAR_DENSE = 0.05
LEAST_SHARE = 0.10
SETTLED = 0.01

Value = Callable[[RunRecord], float | None]


def start(record: RunRecord) -> float | None:
    """The held-out cross-entropy before the first step."""
    return record.initial.get("nll")


def end(record: RunRecord) -> float | None:
    """The held-out cross-entropy after the last step."""
    return record.final.get("nll")


def _by_seed(study: Study, arm: str, value: Value) -> dict[int, float]:
    found = {trial.seed: value(trial.record) for trial in study.select(arm=arm)}
    return {seed: number for seed, number in found.items() if number is not None}


def _difference(name: str, statement: str, better: dict[int, float], worse: dict[int, float], least: float) -> Claim:
    """Whether `worse` exceeds `better`, seed by seed, by `least` and more than the standard error."""
    seeds = sorted(set(better) & set(worse))
    if not seeds:
        return Claim(name=name, statement=statement, holds=False, evidence="no seed finished both")
    gains = [worse[seed] - better[seed] for seed in seeds]
    mean = statistics.fmean(gains)
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    evidence = (
        f"{statistics.fmean(better[s] for s in seeds):.4f} against {statistics.fmean(worse[s] for s in seeds):.4f}, "
        f"difference {mean:+.4f} (standard error {error:.4f} over {len(seeds)} paired seeds)"
    )
    return Claim(name=name, statement=statement, holds=mean - error > least, evidence=evidence)


def _claims(study: Study) -> tuple[Claim, ...]:
    one_shot, dense = _by_seed(study, "fixed_ce", start), _by_seed(study, "dense", start)
    final = {arm: _by_seed(study, arm, end) for arm in TITLES}
    pairs = [
        ("fixed_ce", "one-shot", one_shot, "training with the one-shot mask kept lowers the one-shot loss"),
        ("fixed_kd", "fixed_ce", final["fixed_ce"], "with the mask kept, a teacher ends lower than labels alone"),
        ("ast", "fixed_kd", final["fixed_kd"], "AST ends lower than the one-shot mask kept, both with a teacher"),
        ("ast", "moving", final["moving"], "AST ends lower than a mask that moves without decay"),
        ("ast", "static", final["static"], "a decay that grows ends lower than a constant one"),
        ("ast", "ast_ce", final["ast_ce"], "AST ends lower with the teacher than without"),
        ("ast_slorb", "ast", final["ast"], "SLoRB ends lower than AST without it"),
    ]
    claims = [_difference(f"{a} < {b}", text, final[a], other, 0.0) for a, b, other, text in pairs]
    boosted = _by_seed(study, "ast_slorb", start)
    text = "before any training SLoRB lowers the one-shot loss"
    claims.append(_difference("SLoRB one-shot < one-shot", text, boosted, one_shot, 0.0))
    return (*claims, _near_dense(final["ast"], dense), _share_closed(final, one_shot, dense), *_settles(study))


def _near_dense(ast: dict[int, float], dense: dict[int, float]) -> Claim:
    gaps = [ast[seed] - dense[seed] for seed in sorted(set(ast) & set(dense))]
    mean = statistics.fmean(gaps) if gaps else math.inf
    return Claim(
        name="near dense",
        statement=f"AST ends within {NEAR_DENSE} nat/token of the dense model it started from",
        holds=mean <= NEAR_DENSE,
        evidence=f"{mean:+.4f} over {len(gaps)} seeds",
    )


def _share_closed(final: dict[str, dict[int, float]], one_shot: dict[int, float], dense: dict[int, float]) -> Claim:
    seeds = sorted(set(final["ast"]) & set(final["fixed_ce"]) & set(one_shot) & set(dense))
    shares = [(final["fixed_ce"][s] - final["ast"][s]) / (one_shot[s] - dense[s]) for s in seeds]
    mean = statistics.fmean(shares) if shares else -math.inf
    return Claim(
        name="a tenth of the gap",
        statement=f"AST ends below the one-shot mask with labels by {LEAST_SHARE:.0%} of the one-shot gap",
        holds=mean >= LEAST_SHARE,
        evidence=f"{mean:.1%} of the gap between one-shot and dense, {len(seeds)} seeds",
    )


def _settles(study: Study) -> list[Claim]:
    ast = _by_seed(study, "ast", lambda record: record.value("flip_rate"))
    moving = _by_seed(study, "moving", lambda record: record.value("flip_rate"))
    mean = statistics.fmean(ast.values()) if ast else math.inf
    settled = Claim(
        name="the mask settles",
        statement=f"AST's last update changes less than {SETTLED:.0%} of the mask",
        holds=mean < SETTLED,
        evidence=f"{mean:.3%} over {len(ast)} seeds",
    )
    text = "without decay the last update changes more of the mask"
    return [settled, _difference("decay settles the mask", text, ast, moving, 0.0)]


def _mean_line(label: str, trials: Sequence[Trial], name: str) -> Line:
    """The mean over seeds of a logged series."""
    columns = [dict(trial.record.series.get(name, ())) for trial in trials]
    steps = sorted(set.intersection(*(set(c) for c in columns))) if columns else []
    values = [[v for c in columns if (v := c[step]) is not None] for step in steps]
    return Line(label=label, x=tuple(steps), y=tuple(statistics.fmean(v) if v else None for v in values))


def _loss_line(label: str, trials: Sequence[Trial]) -> Line:
    evaluations = [{e.step: e.metrics.get("nll") for e in trial.record.evaluations} for trial in trials]
    steps = sorted(set.intersection(*(set(e) for e in evaluations)))
    values = [[v for e in evaluations if (v := e[step]) is not None] for step in steps]
    return Line(label=label, x=tuple(steps), y=tuple(statistics.fmean(v) if v else None for v in values))


def analyse(study: Study) -> Findings:
    """Rows, claims and plots."""
    unit = "nat/token"
    rows = [
        Row.over_seeds("dense before", list(_by_seed(study, "dense", start).values()), unit, "29.95 (perplexity)"),
        Row.over_seeds("one-shot 2:4, not trained", list(_by_seed(study, "fixed_ce", start).values()), unit),
        Row.over_seeds(
            "one-shot 2:4 with SLoRB, not trained", list(_by_seed(study, "ast_slorb", start).values()), unit
        ),
    ]
    present = [arm for arm in TITLES if study.select(arm=arm)]
    for arm in present:
        values = [end(trial.record) for trial in study.select(arm=arm)]
        rows.append(Row.over_seeds(TITLES[arm], values, unit, PAPER.get(arm, "")))
    for arm in present:
        rates = [trial.record.value("flip_rate") for trial in study.select(arm=arm)]
        if any(rate is not None for rate in rates):
            rows.append(Row.over_seeds(f"last flip rate, {TITLES[arm]}", rates))
            since = [trial.record.value("initial_flip_rate") for trial in study.select(arm=arm)]
            rows.append(Row.over_seeds(f"changed since the one-shot mask, {TITLES[arm]}", since))
    moving = [arm for arm in ("moving", "static", "ast", "ast_slorb", "ast_ce") if arm in present]
    flips = [_mean_line(TITLES[arm], study.select(arm=arm), "flip_rate") for arm in moving]
    losses = [_loss_line(TITLES[arm], study.select(arm=arm)) for arm in present]
    plots = (
        Plot(title="Mask bits changed by each update", x_label="step", y_label="flip rate", y_log=True,
             lines=tuple(flips)),
        Plot(title="Held-out loss", x_label="step", y_label="nat/token", lines=tuple(losses)),
    )  # fmt: skip
    return Findings(rows=tuple(rows), claims=_claims(study), plots=plots)
