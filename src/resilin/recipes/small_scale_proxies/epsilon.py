"""Section 3.4: an eps that is large beside the gradients slows learning."""

from __future__ import annotations

from resilin.recipes.findings import Claim, Findings, Row, Study
from resilin.recipes.small_scale_proxies.curves import LOSS, in_every_seed, paired

SERIES = "update_rms/blocks.0.mlp.up.weight"


def epsilon_findings(study: Study) -> Findings:
    """Final loss by eps, with gradients made tiny and at a high learning rate."""
    rows: list[Row] = []
    claims: list[Claim] = []
    for grid, words in (("eps", "loss x 1e-6"), ("eps_high_lr", "highest learning rate")):
        losses: dict[float, dict[int, float]] = {}
        updates: dict[float, list[float | None]] = {}
        for trial in study.select(grid):
            eps, record = float(trial.axes["eps"]), trial.record
            loss, start = record.final.get(LOSS), record.initial.get(LOSS)
            final = start if loss is None else loss
            losses.setdefault(eps, {})[trial.seed] = final if final is not None else float("inf")
            updates.setdefault(eps, []).append(record.value(SERIES))
        if not losses:
            continue
        for eps in sorted(losses):
            rows.append(Row.over_seeds(f"final loss, {words}, eps {eps:g}", list(losses[eps].values()), "nat/token"))
            rows.append(Row.over_seeds(f"RMS of Adam's update at the end, {words}, eps {eps:g}", updates[eps]))
        large, small = max(e for e in losses if e < max(losses)), min(losses)
        if grid == "eps":
            claims += [
                in_every_seed(
                    f"eps {high:g} is slower than {low:g}",
                    f"with a gradient 1e6 times smaller, eps {high:g} ends above eps {low:g}",
                    paired(losses[high], losses[low]),
                    "nat/token",
                )
                for high, low in ((large, small), (max(losses), large))
            ]
        else:
            claims.append(
                in_every_seed(
                    "eps 1e-15 helps at the highest learning rate",
                    f"at the highest learning rate, eps {max(losses):g} ends above eps {small:g}",
                    paired(losses[max(losses)], losses[small]),
                    "nat/token",
                )
            )
    return Findings(rows=tuple(rows), claims=tuple(claims))
