"""Section 3.3 and 3.4: what norms of small models say of larger ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from resilin.evaluate.critical_size import predict_critical
from resilin.evaluate.epsilon import eps_advice
from resilin.evaluate.gradient_probes import before_clipping
from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, RunRecord, Study, Table
from resilin.recipes.small_scale_proxies.attention import LOGIT
from resilin.recipes.small_scale_proxies.curves import Sweep, label, sweeps

PAPER_MOMENT = 0.02
"""The paper reads logits at step 2000 of 1e5."""
GRADIENT = "probe/gradient_rms/blocks.0.mlp.up.weight"
CLIP_NORM, EPS = 1.0, 1e-8
"""Where a record does not say otherwise."""


def moment_of(study: Study) -> float:
    """The part of a run at which logits are read: the paper's where runs are long enough to have grown any."""
    steps = max((t.record.settings["train"]["steps"] for t in study.trials), default=0)
    return PAPER_MOMENT if steps >= 5000 else 0.2


def logit_at(record: RunRecord, moment: float) -> float | None:
    """Block 0's largest attention logit at a part of the run."""
    return record.value(LOGIT, max(1, round(moment * record.settings["train"]["steps"])))


def gradient_rms(record: RunRecord) -> float | None:
    """Gradient RMS of block 0's first feed-forward matrix before clipping, mean over the last tenth of the run."""
    train = record.settings["train"]
    norms = dict(record.series.get("grad_norm", ()))
    found = [
        before_clipping(rms, norms.get(step) or 0.0, float(train["clip_norm"]))
        for step, rms in record.series.get(GRADIENT, ())
        if rms is not None and step > 0.9 * train["steps"]
    ]
    return statistics.fmean(found) if found else None


def _points(found: Sequence[Sweep], lr: float, measure: str, moment: float) -> list[tuple[float, float]]:
    """(parameters, geometric mean over seeds) of a measure at one learning rate."""
    points = []
    for sweep in found:
        records = [record for (rate, _), record in sweep.records.items() if rate == lr]
        values = [logit_at(r, moment) if measure == "logit" else gradient_rms(r) for r in records]
        kept = [v for v in values if v is not None and v > 0 and math.isfinite(v)]
        if kept:
            points.append((float(sweep.parameters), math.exp(statistics.fmean(map(math.log, kept)))))
    return sorted(points)


def size_findings(study: Study) -> Findings:
    """Attention logits and gradients over model size, and what they predict."""
    found = sweeps(study, "size")
    arms = {arm: [s for s in found if s.arm == arm] for arm in dict.fromkeys(s.arm for s in found)}
    parts = []
    if len(arms.get("none", [])) >= 3:
        parts.append(_logits(arms["none"], moment_of(study)))
    parts += [_gradients(arm, members) for arm, members in arms.items() if len(members) >= 3]
    return Findings(
        rows=tuple(r for p in parts for r in p.rows),
        claims=tuple(c for p in parts for c in p.claims),
        tables=tuple(t for p in parts for t in p.tables),
        plots=tuple(x for p in parts for x in p.plots),
        notes=tuple(n for p in parts for n in p.notes),
    )


def _logits(found: list[Sweep], moment: float) -> Findings:
    rows, lines, notes, misses = [], [], [], []
    for lr in found[0].rates:
        points = _points(found, lr, "logit", moment)
        if len(points) < 3:
            continue
        whole, blind = predict_critical(points), predict_critical(points[:-1])
        largest, measured = points[-1]
        foretold = blind.at(largest)
        misses.append(abs(math.log(foretold / measured)))
        rows.append((f"{lr:g}", *(round(v, 2) for _, v in points), round(foretold, 2), str(whole)))
        lines.append(Line(label=f"lr {lr:g}", x=tuple(n for n, _ in points), y=tuple(v for _, v in points)))
        if whole.size is not None:
            notes.append(
                f"At learning rate {lr:g} without qk-norm the fitted attention logit passes 1e4 at {whole}: add "
                "qk-norm before that size."
            )
    if not rows:
        return Findings()
    sizes = [sweep.parameters for sweep in sorted(found, key=lambda s: s.parameters)]
    table = Table(
        title=f"Largest |attention logit| of block 0 without qk-norm, at {moment:.0%} of the run",
        columns=("lr", *(f"N = {_size(n)}" for n in sizes), "predicted for the largest", "critical size (all sizes)"),
        rows=tuple(rows),
        note="The prediction for the largest model is fitted to the smaller ones; N leaves out embedding and head.",
    )
    factor = math.exp(statistics.fmean(misses))
    row = Row(
        name="attention logit of the largest model over its prediction from the smaller ones (or the inverse)",
        value=factor, spread=None, count=len(found[0].losses), unit="times", paper="matched, sec. 3.3",
    )  # fmt: skip
    claim = Claim(
        name="small models foretell the logit",
        statement="the largest model's attention logit is predicted from the smaller ones within a factor of 3",
        holds=max(misses) < math.log(3),
        evidence=f"off by {factor:.2f} times on average, {math.exp(max(misses)):.2f} at worst, {len(misses)} rates",
    )
    plot = Plot(
        title="logits over size", x_label="parameters", y_label="max |logit|, block 0", x_log=True, y_log=True,
        lines=tuple(lines),
    )  # fmt: skip
    return Findings(rows=(row,), claims=(claim,), tables=(table,), plots=(plot,), notes=tuple(notes))


def _gradients(arm: str, found: list[Sweep]) -> Findings:
    rows, lines, notes, slopes = [], [], [], []
    for lr in found[0].rates:
        points = _points(found, lr, "gradient", 1.0)
        if len(points) < 2:
            continue
        advice = eps_advice(points, EPS)
        slopes.append(advice.slope)
        rows.append(
            (
                f"{lr:g}",
                *(f"{v:.2e}" for _, v in points),
                round(advice.slope, 3),
                f"{advice.critical_size:.1e}" if advice.critical_size is not None else "none",
            )
        )
        lines.append(Line(label=f"lr {lr:g}", x=tuple(n for n, _ in points), y=tuple(v for _, v in points)))
        if arm == "standard":
            notes.append(f"Learning rate {lr:g}, extrapolated: {advice.text(1e9)}.")
    if not rows:
        return Findings()
    sizes = [sweep.parameters for sweep in sorted(found, key=lambda s: s.parameters)]
    table = Table(
        title=f"Gradient RMS of block 0's first feed-forward matrix, {label(arm)}, last tenth of the run",
        columns=("lr", *(f"N = {_size(n)}" for n in sizes), "log-log slope", "size where RMS = 10 eps"),
        rows=tuple(rows),
    )
    claims: tuple[Claim, ...] = ()
    if arm == "standard":
        claims = (
            Claim(
                name="gradients shrink with size",
                statement="gradient RMS falls with model size at every learning rate",
                holds=max(slopes) < 0,
                evidence=f"log-log slopes {min(slopes):.2f} to {max(slopes):.2f}",
            ),
        )
    plot = Plot(
        title=f"gradient RMS, {label(arm)}", x_label="parameters", y_label="gradient RMS", x_log=True, y_log=True,
        lines=tuple(lines),
    )  # fmt: skip
    return Findings(claims=claims, tables=(table,), plots=(plot,), notes=tuple(notes))


def _size(parameters: int) -> str:
    for unit, word in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{word}"
    return str(parameters)
