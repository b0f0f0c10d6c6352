"""Section 2.2 and 3.1: final loss over learning rate, condensed into its sensitivity."""

from __future__ import annotations

import statistics

from resilin.evaluate.stability import best_lr, highest_stable_lr
from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, Study, Table
from resilin.recipes.small_scale_proxies.curves import Sweep, in_every_seed, label, one, paired, sweeps


def curve_table(title: str, found: list[Sweep], names: list[str], note: str = "") -> Table:
    """Final loss by learning rate, and what it condenses to."""
    rates = found[0].rates
    rows = []
    for sweep, name in zip(found, names, strict=True):
        curve, start = sweep.mean_curve(), statistics.fmean(sweep.initial.values())
        lrs = list(sweep.sensitivity().values())
        spread = f" ± {statistics.stdev(lrs):.2g}" if len(lrs) > 1 else ""
        stable = highest_stable_lr(dict(curve), start)
        rows.append(
            (
                name,
                *(round(curve[lr], 3) if lr in curve else None for lr in rates),
                f"{statistics.fmean(lrs):.3f}{spread}",
                f"{best_lr(dict(curve), start):g}",
                f"{stable:g}" if stable is not None else "none",
            )
        )
    columns = ("", *(f"lr {lr:g}" for lr in rates), "LR sensitivity", "best lr", "highest stable lr")
    return Table(title=title, columns=columns, rows=tuple(rows), note=note)


def sensitivity_findings(study: Study) -> Findings:
    """Whether qk-norm lowers learning rate sensitivity."""
    found = sweeps(study, "learning_rate")
    if not found:
        return Findings()
    rows = tuple(
        Row.over_seeds(f"LR sensitivity, {label(s.arm)}", list(s.sensitivity().values()), "nat/token", "in plots only")
        for s in found
    )
    claims = []
    none, normed, standard = (one(found, arm) for arm in ("none", "qk_norm", "standard"))
    if none is not None and normed is not None:
        claims.append(
            in_every_seed(
                "qk-norm lowers sensitivity",
                "LR sensitivity is lower with qk-norm than without",
                paired(none.sensitivity(), normed.sensitivity()),
            )
        )
        top = none.rates[-1]
        gains = paired(
            {s: _at(none, s, top) for s in none.losses},
            {s: _at(normed, s, top) for s in normed.losses},
        )
        claims.append(
            in_every_seed(
                "qk-norm trains at the top rate",
                f"at the highest learning rate ({top:g}) the final loss is lower with qk-norm than without",
                gains,
                "nat/token",
            )
        )
    if normed is not None and standard is not None:
        changes = [abs(d) for d in paired(standard.best(), normed.best())]
        claims.append(
            Claim(
                name="z-loss is harmless",
                statement="z-loss changes the best final loss by less than 0.05 nat/token",
                holds=max(changes) < 0.05,
                evidence=f"by {max(changes):.2g} at most over {len(changes)} seeds",
            )
        )
    tables = (curve_table("Final validation loss (nat/token, mean over seeds)", found, [label(s.arm) for s in found]),)
    lines = tuple(
        Line(label=label(s.arm), x=tuple(s.rates), y=tuple(s.mean_curve().values()), spread=tuple(s.spread().values()))
        for s in found
    )
    plot = Plot(
        title="final loss", x_label="learning rate", y_label="validation loss (nat/token)", x_log=True, lines=lines
    )
    return Findings(rows=rows, claims=tuple(claims), tables=tables, plots=(plot,))


def _at(sweep: Sweep, seed: int, lr: float) -> float:
    loss = sweep.losses[seed][lr]
    return sweep.initial[seed] if loss is None else min(loss, sweep.initial[seed])
