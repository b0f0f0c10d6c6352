"""Section 3.1.2: output logits drift away without weight decay, and z-loss holds them."""

from __future__ import annotations

import statistics

from resilin.recipes.findings import Claim, Findings, Study, Table
from resilin.recipes.small_scale_proxies.curves import Sweep, in_every_seed, label, one, paired, sweeps

LOG_Z = "probe/log_z"


def _drift(sweep: Sweep, lr: float) -> dict[int, float]:
    """|mean log Z| at the last measurement, by seed."""
    values = {seed: record.value(LOG_Z) for (rate, seed), record in sweep.records.items() if rate == lr}
    return {seed: abs(value) for seed, value in values.items() if value is not None}


def output_logit_findings(study: Study) -> Findings:
    """Where the softmax's denominator ends with and without z-loss and decay."""
    found = sweeps(study, "output_logits")
    free, held = one(found, "no_decay_no_z_loss"), one(found, "no_decay")
    if free is None or held is None:
        return Findings()
    rates = free.rates
    rows = []
    for sweep in found:
        means = [statistics.fmean(d.values()) if (d := _drift(sweep, lr)) else None for lr in rates]
        rows.append((label(sweep.arm), *(round(m, 3) if m is not None else None for m in means)))
    table = Table(
        title="|mean log Z| of the output logits at the end",
        columns=("", *(f"lr {lr:g}" for lr in rates)),
        rows=tuple(rows),
    )
    top = rates[-1]
    drifts = paired(_drift(free, top), _drift(held, top))
    claim: Claim = in_every_seed(
        "z-loss holds output logits",
        f"without weight decay, log Z at learning rate {top:g} ends nearer to 0 with z-loss than without",
        drifts,
        "in |log Z|",
    )
    return Findings(claims=(claim,), tables=(table,))
