"""The analysis of the recipe `tulu3`: what each stage adds, what it costs a control task, and two pitfalls.

Arms it reads: `sft`, `dpo_norm` and `dpo` (models as their stage left them; the latter two with an axis `steps`),
`grpo` and `ppo` (both from length-normalised DPO, so their first evaluation is that stage's; also with an axis `beta`),
`whole`, `sum` and `mean_of_means` (fine-tuning with one or several micro-batches). Each may be left out; its claims are
then left out too.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from resilin.recipes.findings import Claim, Findings, Line, Metrics, Plot, Row, Study, Table, Trial

ADD, CONTROL, LENGTH, WIN = "verified/add", "verified/max", "length/add", "verified/win"
LEAST_GAIN, MOST_LOSS = 0.10, 0.03
SAME, DRIFT = 1e-4, 10.0
PREFERENCES, KL = "preferences", "kl"
"""Grids."""
_KL_OVER = 5
"""Updates before an evaluation whose measured KL is averaged: a single batch's is noisy."""


def _values(trials: Sequence[Trial], name: str, when: str) -> list[float | None]:
    def of(metrics: Metrics) -> float | None:
        return metrics.get(name)

    return [of(t.record.initial if when == "initial" else t.record.final) for t in trials]


def _last_steps(study: Study, arm: str) -> tuple[Trial, ...]:
    """An arm's trials with its own settings: outside the grid over beta, and of several numbers of steps the most."""
    trials = [t for t in study.select(arm=arm) if t.grid != KL]
    most = max((int(t.axes.get("steps", 0)) for t in trials), default=0)
    return tuple(t for t in trials if t.axes.get("steps", 0) == most)


def _row(study: Study, label: str, arm: str, name: str, when: str, unit: str = "") -> Row | None:
    trials = _last_steps(study, arm)
    return Row.over_seeds(label, _values(trials, name, when), unit) if trials else None


def _differences(study: Study, one: tuple[str, str], other: tuple[str, str], name: str) -> list[float]:
    """(arm, when) minus (arm, when), seed by seed."""
    of_one, of_other = (
        {t.seed: v for t, v in zip(trials, _values(trials, name, when), strict=True) if v is not None}
        for trials, when in ((_last_steps(study, arm), when) for arm, when in (one, other))
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
    measures = [
        ("correct additions", ADD, "share"),
        ("control task, correct", CONTROL, "share"),
        ("preferred to SFT's answer by the judge", WIN, "share"),
        ("length of answers to additions", LENGTH, "tokens"),
    ]
    rows = [
        _row(study, f"{measure}, {label}", arm, name, when, unit)
        for measure, name, unit in measures
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
    return [row for row in rows if row is not None], claims


Course = list[tuple[float, float]]
"""Win rate and mean length after fewer and more updates, the fine-tuned model's first."""


def _paths(study: Study, arm: str) -> dict[int, Course]:
    """By seed."""
    found: dict[int, Course] = {}
    trials = study.select(grid=PREFERENCES, arm=arm)
    for trial in (*study.select(arm="sft"), *sorted(trials, key=lambda t: int(t.axes["steps"]))):
        win, length = trial.record.initial.get(WIN), trial.record.initial.get(LENGTH)
        if win is not None and length is not None:
            found.setdefault(trial.seed, []).append((win, length))
    return {seed: path for seed, path in found.items() if len(path) > 1}


def length_at(path: Course, win: float) -> float | None:
    """The length where a path first reaches a win rate, its points joined by straight lines; None: it never does."""
    for (before, shorter), (after, longer) in itertools.pairwise(path):
        if before <= win <= after:
            part = (win - before) / (after - before) if after > before else 0.0
            return shorter + part * (longer - shorter)
    return None


def _equal_wins(study: Study) -> tuple[list[Row], list[Claim]]:
    """Lengths of both losses at the highest win rate that both reach, seed by seed."""
    norm, plain = _paths(study, "dpo_norm"), _paths(study, "dpo")
    rates, lengths = [], []
    for seed in sorted(norm.keys() & plain.keys()):
        rate = min(max(win for win, _ in path) for path in (norm[seed], plain[seed]))
        of_norm, of_plain = length_at(norm[seed], rate), length_at(plain[seed], rate)
        if of_norm is not None and of_plain is not None:
            rates.append(rate)
            lengths.append((of_norm, of_plain))
    if not rates:
        return [], []
    rows = [
        Row.over_seeds("highest win rate over SFT that both losses reach", rates, "share"),
        Row.over_seeds("length there, DPO (length-normalised)", [norm for norm, _ in lengths], "tokens"),
        Row.over_seeds("length there, DPO (plain)", [plain for _, plain in lengths], "tokens"),
    ]
    statement = (
        "where longer answers were preferred, length-normalised DPO writes shorter ones than plain DPO at one win rate"
    )
    saved = [plain - norm for norm, plain in lengths]
    return rows, _claim("dpo_norm answers are shorter", statement, saved, 1e-9, "tokens")


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


def _over_seeds(points: list[list[float]]) -> tuple[tuple[float, ...], tuple[float | None, ...]]:
    """Mean and standard deviation of each column of equally long lists."""
    columns = list(zip(*points, strict=True))
    spread = [statistics.stdev(c) if len(c) > 1 else None for c in columns]
    return tuple(statistics.fmean(c) for c in columns), tuple(spread)


def _curves(study: Study) -> Plot:
    """Held-out answers along RLVR, means over seeds."""
    lines = []
    for arm in ("grpo", "ppo"):
        trials = [t for t in _last_steps(study, arm) if t.record.final]
        for name, label in ((ADD, "additions"), (CONTROL, "control task")):
            curves = [[e.metrics.get(name) or 0.0 for e in t.record.evaluations] for t in trials]
            if curves:
                mean, spread = _over_seeds(curves)
                steps = tuple(float(e.step) for e in trials[0].record.evaluations)
                lines.append(Line(label=f"{arm.upper()}, {label}", x=steps, y=mean, spread=spread))
    return Plot(title="Verified answers, held out", x_label="update", y_label="share correct", lines=tuple(lines))


def _lengths(study: Study) -> Plot:
    """What length each loss pays for its win rate."""
    lines = []
    for arm, label in (("dpo_norm", "length-normalised"), ("dpo", "plain")):
        paths = list(_paths(study, arm).values())
        if paths and len({len(path) for path in paths}) == 1:
            wins, _ = _over_seeds([[win for win, _ in path] for path in paths])
            lengths, spread = _over_seeds([[length for _, length in path] for path in paths])
            lines.append(Line(label=label, x=wins, y=lengths, spread=spread))
    return Plot(title="DPO, more and more updates", x_label="win rate over SFT", y_label="tokens", lines=tuple(lines))


def _kl_at(trial: Trial, step: int) -> float | None:
    """Mean KL to the reference, nats a token, over the updates that end at a step."""
    near = [v for s, v in trial.record.series.get("kl", ()) if step - _KL_OVER < s <= step and v is not None]
    return statistics.fmean(near) if near else None


def _beta(trial: Trial) -> float:
    return float(trial.record.settings.get("objective", {}).get("beta", math.nan))


def _divergence(study: Study) -> tuple[list[Table], list[Plot]]:
    """Score against KL, for each strength of the pull to the reference."""
    tables, plots = [], []
    for arm in ("grpo", "ppo"):
        betas: dict[float, list[Trial]] = {}
        for trial in study.select(arm=arm):
            if trial.record.final:
                betas.setdefault(_beta(trial), []).append(trial)
        if len(betas) < 2:
            continue
        rows, lines = [], []
        for beta, trials in sorted(betas.items()):
            evaluated = [e.step for e in trials[0].record.evaluations if e.step]
            curves = [[(_kl_at(t, e.step), e.metrics.get(ADD)) for e in t.record.evaluations if e.step] for t in trials]
            whole = [c for c in curves if len(c) == len(evaluated) and all(None not in point for point in c)]
            if not whole:
                continue
            kls, _ = _over_seeds([[kl or 0.0 for kl, _ in c] for c in whole])
            adds, spread = _over_seeds([[add or 0.0 for _, add in c] for c in whole])
            controls = [c for t in trials if (c := t.record.final.get(CONTROL)) is not None]
            rows.append((beta, kls[-1], adds[-1], statistics.fmean(controls) if controls else None, len(whole)))
            lines.append(Line(label=f"beta {beta:g}", x=kls, y=adds, spread=spread))
        columns = ("beta", "KL to the DPO model, nats a token", "correct additions", "control task", "seeds")
        tables.append(Table(title=f"{arm.upper()}, pull to the reference", columns=columns, rows=tuple(rows)))
        plots.append(
            Plot(title=f"{arm.upper()}: score against KL", x_label="KL, nats a token", y_label="correct additions",
                 x_log=True, lines=tuple(lines))
        )  # fmt: skip
    return tables, plots


def _notes(study: Study) -> list[str]:
    """How right drawn answers are where reinforcement begins: what it can learn from."""
    notes = []
    for arm in ("grpo", "ppo"):
        first = [t.record.series["verified"][0][1] for t in _last_steps(study, arm) if t.record.series.get("verified")]
        known = [value for value in first if value is not None]
        if known:
            shares = ", ".join(f"{100 * value:.0f}" for value in known)
            notes.append(f"{arm.upper()} begins with {shares} % of its drawn answers right (by seed, temperature 1).")
    return notes


def analyse(study: Study) -> Findings:
    """Rows, claims, tables and plots of all arms there are."""
    parts = [_stages(study), _equal_wins(study), _aggregation(study)]
    tables, plots = _divergence(study)
    drawn = [plot for plot in (_curves(study), _lengths(study), *plots) if plot.lines]
    return Findings(
        rows=tuple(row for rows, _ in parts for row in rows),
        claims=tuple(claim for _, claims in parts for claim in claims),
        tables=tuple(tables),
        plots=tuple(drawn),
        notes=tuple(_notes(study)),
    )
