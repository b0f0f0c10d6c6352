"""The analysis of the recipe `tulu3`: what each stage adds, what it costs a control task, and two pitfalls.

Arms it reads: `sft` and `dpo` (models as their stage left them), `grpo` and `ppo` (both from length-normalised DPO, so
their first evaluation is that stage's), `whole`, `sum` and `mean_of_means` (fine-tuning with one or several
micro-batches). Each may be left out; its claims are then left out too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from resilin.recipes.findings import Claim, Findings, Line, Metrics, Plot, Row, Study, Trial

ADD, CONTROL = "verified/add", "verified/max"
LEAST_GAIN, MOST_LOSS = 0.10, 0.03
SAME, DRIFT = 1e-4, 10.0


def _values(trials: Sequence[Trial], name: str, when: str) -> list[float | None]:
    def of(metrics: Metrics) -> float | None:
        return metrics.get(name)

    return [of(t.record.initial if when == "initial" else t.record.final) for t in trials]


def _row(study: Study, label: str, arm: str, name: str, when: str, unit: str = "") -> Row | None:
    trials = study.select(arm=arm)
    return Row.over_seeds(label, _values(trials, name, when), unit) if trials else None


def _differences(study: Study, one: tuple[str, str], other: tuple[str, str], name: str) -> list[float]:
    """(arm, when) minus (arm, when), seed by seed."""
    of_one, of_other = (
        {t.seed: v for t, v in zip(trials, _values(trials, name, when), strict=True) if v is not None}
        for trials, when in ((study.select(arm=arm), when) for arm, when in (one, other))
    )
    return [of_one[seed] - of_other[seed] for seed in sorted(of_one) if seed in of_other]


def _claim(name: str, statement: str, differences: list[float], least: float, unit: str = "points") -> list[Claim]:
    """Whether the mean difference over seeds reaches `least`; its standard error is told, not used."""
    if not differences:
        return []
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    scale = 100.0 if unit == "points" else 1.0
    evidence = (
        f"{scale * mean:+.2f} {unit} over {len(differences)} seeds, standard error {scale * error:.2f}"
        if len(differences) > 1
        else f"{scale * mean:+.2f} {unit}, one seed"
    )
    return [Claim(name=name, statement=statement, holds=mean >= least, evidence=evidence)]


def _stages(study: Study) -> tuple[list[Row], list[Claim]]:
    places = [
        ("SFT", "sft", "initial"),
        ("DPO (length-normalised)", "grpo", "initial"),
        ("DPO (plain)", "dpo", "initial"),
        ("GRPO", "grpo", "final"),
        ("PPO", "ppo", "final"),
    ]
    measures = [("correct additions", ADD), ("control task, correct", CONTROL), ("length of answers", "length")]
    rows = [
        _row(study, f"{measure}, {label}", arm, name, when, "tokens" if name == "length" else "share")
        for measure, name in measures
        for label, arm, when in places
    ]
    before = ("grpo", "initial")
    claims = _claim(
        "SFT < DPO", "preferences add correct answers", _differences(study, before, ("sft", "initial"), ADD), 1e-9
    )
    for arm, title in (("grpo", "GRPO"), ("ppo", "PPO")):
        after = (arm, "final")
        gain, kept = (_differences(study, after, (arm, "initial"), name) for name in (ADD, CONTROL))
        claims += _claim(f"DPO <= {title}", f"{title} loses no correct answers against DPO", gain, 0.0)
        claims += _claim(
            f"{title} adds {LEAST_GAIN:.0%}", f"{title} adds at least {100 * LEAST_GAIN:.0f} points", gain, LEAST_GAIN
        )
        claims += _claim(
            f"{title} keeps the control task",
            f"a task that {title} does not train loses at most {100 * MOST_LOSS:.0f} points",
            kept,
            -MOST_LOSS,
        )
    shorter = _differences(study, ("dpo", "initial"), before, "length")
    claims += _claim(
        "dpo_norm answers are shorter",
        "where longer answers were preferred, length-normalised DPO writes shorter ones than plain DPO",
        shorter,
        1e-9,
        "tokens",
    )
    return [row for row in rows if row is not None], claims


def _aggregation(study: Study) -> tuple[list[Row], list[Claim]]:
    exact = [abs(d) for d in _differences(study, ("sum", "final"), ("whole", "final"), "loss")]
    wrong = [abs(d) for d in _differences(study, ("mean_of_means", "final"), ("whole", "final"), "loss")]
    if not exact or not wrong:
        return [], []
    rows = [
        Row.over_seeds("held-out loss against the whole batch, sums over micro-batches", list(exact), "nat/token"),
        Row.over_seeds("held-out loss against the whole batch, mean of means", list(wrong), "nat/token"),
    ]
    holds = max(exact) <= SAME and statistics.fmean(wrong) > DRIFT * statistics.fmean(exact)
    evidence = (
        f"sums: at most {max(exact):.1e} nat/token apart; means of means: {statistics.fmean(wrong):.1e} on average"
    )
    statement = "summing over micro-batches trains the same model as the whole batch; a mean of means drifts away"
    return rows, [Claim(name="sums over micro-batches", statement=statement, holds=holds, evidence=evidence)]


def _curves(study: Study) -> tuple[Plot, ...]:
    lines = []
    for arm in ("grpo", "ppo"):
        for trial in study.select(arm=arm):
            for name, label in ((ADD, "additions"), (CONTROL, "control")):
                lines.append(
                    Line(
                        label=f"{arm}, {label}, seed {trial.seed}",
                        x=tuple(e.step for e in trial.record.evaluations),
                        y=tuple(e.metrics.get(name) for e in trial.record.evaluations),
                    )
                )
    return (Plot(title="Verified answers", x_label="update", y_label="share correct", lines=tuple(lines)),)


def analyse(study: Study) -> Findings:
    """Rows and claims of all arms there are."""
    rows, claims = _stages(study)
    more_rows, more_claims = _aggregation(study)
    return Findings(rows=(*rows, *more_rows), claims=(*claims, *more_claims), plots=_curves(study))
