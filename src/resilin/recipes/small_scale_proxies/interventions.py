"""Section 3.2: other interventions and ways of scaling, by what they do to learning rate sensitivity."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from resilin.evaluate.stability import best_lr, capped, lr_sensitivity_over_sets
from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, Study, Table
from resilin.recipes.recipe import Value
from resilin.recipes.small_scale_proxies.curves import Sweep, in_every_seed, label, one, paired, sweeps
from resilin.recipes.small_scale_proxies.sensitivity import curve_table


def intervention_findings(study: Study) -> Findings:
    """What qk-norm is taken over, decay, warm-up, muParam, width and depth."""
    parts = [_norm_over(study), _decay(study), _warmup(study), _mup(study), _shape(study)]
    return Findings(
        rows=tuple(r for p in parts for r in p.rows),
        claims=tuple(c for p in parts for c in p.claims),
        tables=tuple(t for p in parts for t in p.tables),
        plots=tuple(x for p in parts for x in p.plots),
    )


def _table(title: str, found: Sequence[Sweep], names: Sequence[str], note: str = "") -> Table:
    return curve_table(title, list(found), list(names), note)


def _norm_over(study: Study) -> Findings:
    """Whether a norm over all heads at once is slightly worse than one over each."""
    found = sweeps(study, "qk_norm_over")
    head, width = one(found, "standard"), one(found, "qk_norm_width")
    if head is None or width is None:
        return Findings()
    names = ["over each head", "over the width"]
    rows = tuple(
        Row.over_seeds(f"LR sensitivity, qk-norm {name}", list(s.sensitivity().values()), "nat/token")
        for name, s in zip(names, (head, width), strict=True)
    )
    claim = in_every_seed(
        "qk-norm over the width is worse",
        "the final loss, averaged over learning rates, is higher with qk-norm over the width than over each head",
        paired(_average(width), _average(head)),
        "nat/token",
    )
    return Findings(rows=rows, claims=(claim,), tables=(_table("What qk-norm is taken over", [head, width], names),))


def _average(sweep: Sweep) -> dict[int, float]:
    """By seed, the mean final loss over learning rates."""
    return {
        seed: statistics.fmean(capped(loss, sweep.initial[seed]) for loss in curve.values())
        for seed, curve in sweep.losses.items()
    }


def coupled_sensitivity(sweep: Sweep) -> dict[int, float]:
    """The lesser sensitivity over the rates without the lowest and without the highest: the set, and it shifted down.

    Coupling moves the best learning rate up, so the paper lets coupled decay choose its set.
    """
    sets = (sweep.rates[1:], sweep.rates[:-1])
    return {s: lr_sensitivity_over_sets(curve, sets, sweep.initial[s]) for s, curve in sweep.losses.items()}


def _decay(study: Study) -> Findings:
    found = sweeps(study, "decay")
    standard, coupled = one(found, "standard"), one(found, "coupled_decay")
    if standard is None or coupled is None:
        return Findings()
    independent = standard.sensitivity(standard.rates[1:])
    chosen = coupled_sensitivity(coupled)
    rows = (
        Row.over_seeds("LR sensitivity, independent decay 1e-4", list(independent.values()), "nat/token"),
        Row.over_seeds("LR sensitivity, coupled decay 0.1 (lesser of two sets)", list(chosen.values()), "nat/token"),
    )
    claim = in_every_seed(
        "independent decay lowers sensitivity",
        "LR sensitivity is lower with independent than with coupled weight decay",
        paired(chosen, independent),
    )
    table = _table("Weight decay", found, [label(s.arm) if s.arm != "standard" else "independent 1e-4" for s in found])
    return Findings(rows=rows, claims=(claim,), tables=(table,))


def _warmup(study: Study) -> Findings:
    found = sorted(sweeps(study, "warmup"), key=lambda s: float(s.place[0][1]))
    if len(found) < 2:
        return Findings()
    names = [_warmup_name(s.place[0][1]) for s in found]
    rows = tuple(
        Row.over_seeds(f"LR sensitivity, {name}", list(s.sensitivity().values()), "nat/token")
        for name, s in zip(names, found, strict=True)
    )
    claim = in_every_seed(
        "longer warm-up lowers sensitivity",
        f"LR sensitivity is lower with {names[-1]} than with {names[0]}",
        paired(found[0].sensitivity(), found[-1].sensitivity()),
    )
    return Findings(rows=rows, claims=(claim,), tables=(_table("Warm-up", found, names),))


def _warmup_name(warmup: Value) -> str:
    """A schedule's warm-up is a number of steps or, as a float, a part of the run."""
    return f"warm-up {warmup:.0%} of the run" if isinstance(warmup, float) else f"warm-up {warmup} steps"


def _mup(study: Study) -> Findings:
    found = sweeps(study, "mup")
    standard = one(found, "standard")
    narrow = _base_width(study, found)
    if standard is None or len(found) < 2:
        return Findings()
    claims: list[Claim] = []
    times = _hidden_size(standard) / _hidden_size(narrow) if narrow is not None else 1.0
    for sweep in found:
        if sweep.arm == "standard":
            continue
        gains = paired(standard.best(), sweep.best())
        better = paired(standard.sensitivity(), sweep.sensitivity())
        claims.append(
            Claim(
                name=f"{label(sweep.arm)} is no remedy",
                statement=f"{label(sweep.arm)} does not lower both the best loss and LR sensitivity in every seed",
                holds=not (min(gains) > 0 and min(better) > 0),
                evidence=f"best loss {_signed([-g for g in gains])}, sensitivity {_signed([-b for b in better])}",
            )
        )
        if narrow is not None:
            base, wide = _best_rate(narrow), _best_rate(sweep)
            claims.append(
                Claim(
                    name=f"{label(sweep.arm)} keeps the best rate",
                    statement=f"with {label(sweep.arm)} the best learning rate stays at {times:g} times the width",
                    holds=base == wide,
                    evidence=f"{base:g} at the base width, {wide:g} there (standard: {_best_rate(standard):g})",
                )
            )
    table = _table(f"muParam at {times:g} times the base width", found, [label(s.arm) for s in found])
    return Findings(claims=tuple(claims), tables=(table,))


def _base_width(study: Study, scaled: Sequence[Sweep]) -> Sweep | None:
    """The sweep over width at the width that muParam scales from, where it changes no learning rate."""
    widths = {_hidden_size(s): s for s in sweeps(study, "width")}
    bases = [_settings(s)["optimizer"]["optimizer"]["mup_base_width"] for s in scaled if s.arm != "standard"]
    return widths.get(bases[0]) if bases else None


def _settings(sweep: Sweep) -> dict[str, Any]:
    return next(iter(sweep.records.values())).settings


def _hidden_size(sweep: Sweep) -> int:
    return int(_settings(sweep)["model"]["hidden_size"])


def _best_rate(sweep: Sweep) -> float:
    return best_lr(dict(sweep.mean_curve()), statistics.fmean(sweep.initial.values()))


def _shape(study: Study) -> Findings:
    """Whether depth raises sensitivity faster than width does, at equal parameters."""
    width = sorted(sweeps(study, "width"), key=lambda s: s.parameters)
    depth = sorted(sweeps(study, "depth"), key=lambda s: s.parameters)
    if len(width) < 2 or len(depth) < 2:
        return Findings()
    tables = (
        _table("Width only", width, [f"width {s.place[0][1]}, N = {s.parameters:,}" for s in width]),
        _table("Depth only", depth, [f"{s.place[0][1]} layers, N = {s.parameters:,}" for s in depth]),
    )
    claims = []
    wide = [s for s in width if any(abs(s.parameters / d.parameters - 1) < 0.05 for d in depth[1:])]
    deep = [d for d in depth[1:] if any(abs(s.parameters / d.parameters - 1) < 0.05 for s in width)]
    if wide and deep:
        rates = [lr for lr in deep[-1].rates if lr in wide[-1].rates]
        claims.append(
            in_every_seed(
                "depth raises sensitivity faster",
                "at equal parameters, the deeper model has a higher LR sensitivity than the wider one",
                paired(deep[-1].sensitivity(rates), wide[-1].sensitivity(rates)),
            )
        )
    lines = tuple(
        Line(
            label=name,
            x=tuple(float(s.parameters) for s in found),
            y=tuple(statistics.fmean(s.sensitivity().values()) for s in found),
        )
        for name, found in (("width only", width), ("depth only", depth))
    )
    plot = Plot(title="width or depth", x_label="parameters", y_label="LR sensitivity", x_log=True, lines=lines)
    return Findings(claims=tuple(claims), tables=tables, plots=(plot,))


def _signed(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f} over seeds)"
