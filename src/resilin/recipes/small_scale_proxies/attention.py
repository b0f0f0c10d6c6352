"""Section 3.1.1 and 3.3: the growth of attention logits, its remedy, and how large they may be made."""

from __future__ import annotations

import statistics

from resilin.evaluate.critical_size import PAPER_THRESHOLD
from resilin.evaluate.stability import capped
from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, Study, Table
from resilin.recipes.small_scale_proxies.bigram import bigram_loss
from resilin.recipes.small_scale_proxies.curves import LOSS, Sweep, label, one, sweeps

LOGIT = "probe/attention_logit_max/0"
"""Block 0, which the paper watches."""


def attention_findings(study: Study) -> Findings:
    """How the largest attention logit of block 0 grows with learning rate, and what it costs."""
    found = [s for s in sweeps(study, "learning_rate") if s.largest(LOGIT)]
    parts = [_transplant(study)]
    if found:
        parts.append(_growth(found))
    return Findings(
        rows=tuple(r for p in parts for r in p.rows),
        claims=tuple(c for p in parts for c in p.claims),
        tables=tuple(t for p in parts for t in p.tables),
        plots=tuple(x for p in parts for x in p.plots),
    )


def _growth(found: list[Sweep]) -> Findings:
    rates = found[0].rates
    rows = [(label(s.arm), *(_short(statistics.median(s.largest(LOGIT)[lr])) for lr in rates)) for s in found]
    table = Table(
        title="Largest |attention logit| of block 0 in a whole run (median over seeds)",
        columns=("", *(f"lr {lr:g}" for lr in rates)),
        rows=tuple(rows),
    )
    claims, none = [], one(found, "none")
    if none is not None:
        logits = none.largest(LOGIT)
        growth = [top / low for low, top in zip(logits[rates[0]], logits[rates[-1]], strict=True)]
        claims.append(
            Claim(
                name="logits grow with learning rate",
                statement=f"without qk-norm the largest logit grows by more than 100 times from learning rate "
                f"{rates[0]:g} to {rates[-1]:g}",
                holds=min(growth) > 100,
                evidence=f"by {_short(min(growth))} to {_short(max(growth))} times over seeds",
            )
        )
        claims.append(_above_threshold(none))
    normed = one(found, "qk_norm") or one(found, "standard")
    if none is not None and normed is not None:
        top = rates[-1]
        ratios = [a / b for a, b in zip(none.largest(LOGIT)[top], normed.largest(LOGIT)[top], strict=True)]
        claims.append(
            Claim(
                name="qk-norm bounds logits",
                statement=f"with qk-norm the largest logit at learning rate {top:g} is more than 10 times smaller",
                holds=min(ratios) > 10,
                evidence=f"{_short(min(ratios))} to {_short(max(ratios))} times smaller over seeds",
            )
        )
    lines = tuple(
        Line(label=label(s.arm), x=tuple(rates), y=tuple(statistics.median(s.largest(LOGIT)[lr]) for lr in rates))
        for s in found
    )
    plot = Plot(
        title="attention logits", x_label="learning rate", y_label="max |logit|, block 0", x_log=True, y_log=True,
        lines=lines,
    )  # fmt: skip
    return Findings(claims=tuple(claims), tables=(table,), plots=(plot,))


def _above_threshold(none: Sweep) -> Claim:
    """Every run above the paper's threshold loses more than a tenth of what training gains."""
    worst, count, kept = [], 0, 0
    best = none.best()
    for (lr, seed), record in none.records.items():
        peak = max((v if v is not None else PAPER_THRESHOLD * 10 for _, v in record.series.get(LOGIT, ())), default=0.0)
        if peak > PAPER_THRESHOLD:
            count += 1
            start = none.initial[seed]
            lost = (capped(none.losses[seed][lr], start) - best[seed]) / (start - best[seed])
            worst.append(lost)
            kept += lost <= 0.1
    return Claim(
        name="logits above 1e4 fail",
        statement="every run without qk-norm whose largest logit passed 1e4 loses more than a tenth of what training "
        "gains (the paper: all of them diverged)",
        holds=count > 0 and kept == 0,
        evidence=f"{count} runs passed 1e4; they lose {min(worst):.0%} to {max(worst):.0%}" if worst else "no run did",
    )


def _transplant(study: Study) -> Findings:
    """Queries and keys given an RMS of sqrt(kappa), to see which size hurts."""
    losses: dict[float, list[float]] = {}
    for trial in study.select("transplant"):
        loss, start = trial.record.final.get(LOSS), trial.record.initial.get(LOSS)
        untrained = start if start is not None else 0.0
        losses.setdefault(float(trial.axes["kappa"]), []).append(untrained if loss is None else loss)
    if len(losses) < 2:
        return Findings()
    kappas = sorted(losses)
    by_counting = bigram_loss(study.select("transplant")[0].record)
    rows = (
        *(
            Row.over_seeds(f"final loss, logits transplanted to kappa {kappa:g}", losses[kappa], "nat/token")
            for kappa in kappas
        ),
        Row(name="loss of a bigram model counted on the training text", value=by_counting, unit="nat/token"),
    )
    first, last = losses[kappas[0]], losses[kappas[-1]]
    hurt = Claim(
        name="large logits hurt by themselves",
        statement=f"logits made {kappas[-1]:g} large end worse than those of {kappas[0]:g} in every seed (the "
        "paper: worse from about 1e3)",
        holds=min(last) > max(first),
        evidence=f"{statistics.fmean(last):.3f} against {statistics.fmean(first):.3f} nat/token",
    )
    beaten = Claim(
        name="large logits are worse than a bigram model",
        statement=f"logits made {kappas[-1]:g} large end above a bigram model, those of {kappas[0]:g} below it, in "
        "every seed",
        holds=min(last) > by_counting > max(first),
        evidence=f"bigram model {by_counting:.3f}; {min(last):.3f} to {max(last):.3f} against {min(first):.3f} to "
        f"{max(first):.3f} nat/token",
    )
    lines = (
        Line(label="final loss", x=tuple(kappas), y=tuple(statistics.fmean(losses[k]) for k in kappas)),
        Line(label="bigram model", x=(kappas[0], kappas[-1]), y=(by_counting, by_counting)),
    )
    plot = Plot(
        title="transplanted logits", x_label="kappa", y_label="validation loss (nat/token)", x_log=True, lines=lines
    )
    return Findings(rows=rows, claims=(hurt, beaten), plots=(plot,))


def _short(value: float) -> str:
    return f"{value:.1e}" if value >= 1e4 else f"{value:.3g}"
