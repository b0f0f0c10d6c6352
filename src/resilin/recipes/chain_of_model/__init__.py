"""The analysis of the recipe `chain-of-model`: every scale of one model, and a trained model that grows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, Study, Table, Trial
from resilin.recipes.gains import share_claim

SCALES = {
    "chains": "chains, all scales trained",
    "air": "chains that share keys (Air), all scales trained",
    "head_only": "chains trained at the last scale, then the head alone at all",
    "last": "chains trained at the last scale alone",
    "dense": "plain model, cut to its first parts",
    "alone_1": "plain model as wide as 1 chain",
    "alone_2": "plain model as wide as 2 chains",
}
GROWN = {
    "expand": "one chain more",
    "expand_air": "one chain more, sharing keys (Air)",
    "widened": "plain width expansion, all trained",
    "fine_tuned": "fine-tuning of all weights",
    "lora": "LoRA",
}
OLD = "library"
"""The held-out data of the text that the grown models were trained on before."""
UNIT = "nat/byte"
BESIDE_ALONE, BESIDE_DENSE, BELOW_CUT, AIR, GROWTH, FORGOTTEN = 0.05, 0.05, 0.25, 0.05, 0.05, 0.02
"""Shares that claims ask for, chosen before the first run."""


@dataclass(frozen=True, slots=True)
class _Arm:
    """One kind of model over the seeds."""

    name: str
    title: str
    trials: tuple[Trial, ...]

    def values(self, metric: str) -> list[float | None]:
        """A figure of the last evaluation, seed by seed."""
        return [trial.record.final.get(metric) for trial in self.trials]

    def row(self, metric: str, what: str) -> Row:
        """The same as a row."""
        return Row.over_seeds(f"{self.title}, {what}", self.values(metric), UNIT, "")

    @property
    def scales(self) -> tuple[int, ...]:
        """Those that were read, ascending; (): the whole alone."""
        names = (name.removeprefix("loss_at_") for name in self.trials[0].record.final if name.startswith("loss_at_"))
        return tuple(sorted(int(name) for name in names if name.isdecimal()))


def _arm(study: Study, name: str, title: str) -> _Arm | None:
    trials = study.select(arm=name)
    done = tuple(trial for trial in trials if trial.record.status == "finished" and trial.record.evaluations)
    return _Arm(name, title, done) if done and len(done) == len(trials) else None


def _shares(mine: list[float | None], theirs: list[float | None]) -> list[float]:
    return [math.nan if one is None or two is None else one / two for one, two in zip(mine, theirs, strict=True)]


def _scale_claims(arms: dict[str, _Arm]) -> list[Claim]:
    found: list[Claim] = []
    mine = arms.get("chains")
    if mine is None:
        return found
    whole = max(mine.scales, default=0)
    small = [scale for scale in mine.scales if scale < whole]
    for before, after in zip(mine.scales, mine.scales[1:], strict=False):
        shares = _shares(mine.values(f"loss_at_{after}"), mine.values(f"loss_at_{before}"))
        found.append(
            share_claim(
                f"scale {after} over {before}", f"scale {after} is better than scale {before}", shares, 1 - 1e-9
            )
        )
    for scale in small:
        alone = arms.get(f"alone_{scale}")
        if alone is not None:
            found.append(
                share_claim(
                    f"scale {scale} beside a model of its own",
                    f"scale {scale} is at most {BESIDE_ALONE:.0%} above a model of that width trained alone",
                    _shares(mine.values(f"loss_at_{scale}"), alone.values("loss")),
                    1 + BESIDE_ALONE,
                )
            )
    for other, of_what in (
        ("dense", "the first part of a plain model"),
        ("last", "that of chains trained at the last scale"),
    ):
        if other in arms and small:
            found.append(
                share_claim(
                    f"scale 1 beside {other}",
                    f"scale 1 is at least {BELOW_CUT:.0%} below {of_what}",
                    _shares(mine.values("loss_at_1"), arms[other].values("loss_at_1")),
                    1 - BELOW_CUT,
                )
            )
    if "dense" in arms:
        found.append(
            share_claim(
                "full scale beside a plain model",
                f"the full scale is at most {BESIDE_DENSE:.0%} above a plain model of its width",
                _shares(mine.values("loss"), arms["dense"].values("loss")),
                1 + BESIDE_DENSE,
            )
        )
    if "head_only" in arms and "last" in arms:
        found.append(
            share_claim(
                "a taught head",
                "teaching the head alone makes scale 1 better than leaving it",
                _shares(arms["head_only"].values("loss_at_1"), arms["last"].values("loss_at_1")),
                1 - 1e-9,
            )
        )
        found.append(
            share_claim(
                "all scales from the start",
                "training all scales from the start makes scale 1 better than teaching the head",
                _shares(mine.values("loss_at_1"), arms["head_only"].values("loss_at_1")),
                1 - 1e-9,
            )
        )
    if "air" in arms:
        found.append(
            share_claim(
                "shared keys",
                f"with shared keys the full scale is at most {AIR:.0%} above that with keys of their own",
                _shares(arms["air"].values("loss"), mine.values("loss")),
                1 + AIR,
            )
        )
    return found


def _kept(arm: _Arm) -> Claim:
    """Whether the old scale reads the old text as before, to the last bit."""
    name = f"{OLD}/loss_at_1"
    before = [trial.record.initial.get(name) for trial in arm.trials]
    after = arm.values(name)
    holds = None not in before and before == after
    evidence = ", ".join(f"{one!r} -> {two!r}" for one, two in zip(before, after, strict=True))
    return Claim(
        name=f"{arm.name}: the old scale stays",
        statement=f"{arm.title}: the old scale's loss on the old text is the same to the last bit",
        holds=holds,
        evidence=evidence,
    )


def _growth_claims(arms: dict[str, _Arm]) -> list[Claim]:
    found: list[Claim] = []
    for name in ("expand", "expand_air"):
        arm = arms.get(name)
        if arm is None:
            continue
        found.append(_kept(arm))
        before = [trial.record.initial.get("loss") for trial in arm.trials]
        found.append(
            share_claim(
                f"{name}: the new text",
                f"{arm.title}: its loss on the new text falls",
                _shares(arm.values("loss"), before),
                1 - 1e-9,
            )
        )
        for other in ("widened", "lora"):
            if other in arms and name == "expand":
                most = 1 + GROWTH if other == "widened" else 1 - 1e-9
                words = f"is at most {GROWTH:.0%} above" if other == "widened" else "is below"
                found.append(
                    share_claim(
                        f"beside {other}",
                        f"on the new text it {words} that of {GROWN[other]}",
                        _shares(arm.values("loss"), arms[other].values("loss")),
                        most,
                    )
                )
    tuned = arms.get("fine_tuned")
    if tuned is not None:
        before = [trial.record.initial.get(f"{OLD}/loss") for trial in tuned.trials]
        shares = _shares(before, tuned.values(f"{OLD}/loss"))
        found.append(
            share_claim(
                "fine-tuning forgets",
                f"fine-tuning raises the loss on the old text by at least {FORGOTTEN:.0%}",
                shares,
                1 / (1 + FORGOTTEN),
            )
        )
    return found


def _scale_table(arms: dict[str, _Arm]) -> Table:
    columns = sorted({scale for arm in arms.values() for scale in arm.scales})
    rows = []
    for arm in arms.values():
        alone = arm.name.removeprefix("alone_") if arm.name.startswith("alone_") else None
        cells: list[float | str | int | None] = [arm.title, arm.trials[0].record.non_embedding]
        for scale in columns:
            whole = scale == columns[-1] if alone is None else str(scale) == alone
            name = "loss" if whole else f"loss_at_{scale}"
            cells.append(arm.row(name, "").value if alone is None or whole else None)
        rows.append(tuple(cells))
    return Table(
        title="Held-out loss by scale, mean over seeds",
        columns=("model", "parameters without embedding", *(f"scale {scale}" for scale in columns)),
        rows=tuple(rows),
        note="Parameters are those of the whole model.",
    )


def _growth_table(arms: dict[str, _Arm]) -> Table:
    rows = []
    for arm in arms.values():
        kept = f"{OLD}/loss_at_1" if arm.scales else f"{OLD}/loss"
        before = Row.over_seeds("", [trial.record.initial.get(kept) for trial in arm.trials], UNIT, "")
        rows.append(
            (
                arm.title,
                arm.trials[0].record.parameters,
                arm.row("loss", "").value,
                before.value,
                arm.row(f"{OLD}/loss", "").value,
                arm.row(f"{OLD}/loss_at_1", "").value if arm.scales else None,
            )
        )
    return Table(
        title="A trained model that learns another text: held-out losses, mean over seeds",
        columns=(
            "model", "parameters", "new text", "old text, before", "old text, whole model", "old text, old scale",
        ),
        rows=tuple(rows),
        note="Only the new text is trained on. The old scale is there to be used for the old text: `chains=1`.",
    )  # fmt: skip


def _line(arm: _Arm) -> Line:
    rows = [arm.row(f"loss_at_{scale}", "") for scale in arm.scales]
    return Line(
        label=arm.title,
        x=tuple(float(scale) for scale in arm.scales),
        y=tuple(row.value for row in rows),
        spread=tuple(row.spread for row in rows),
    )


def _alone_line(arms: dict[str, _Arm]) -> Line | None:
    rows = {int(name[-1]): arm.row("loss", "") for name, arm in arms.items() if name.startswith("alone_")}
    if "dense" in arms and rows:
        rows[max(rows) + 1] = arms["dense"].row("loss", "")
    if not rows:
        return None
    return Line(
        label="plain models trained alone",
        x=tuple(float(scale) for scale in rows),
        y=tuple(row.value for row in rows.values()),
        spread=tuple(row.spread for row in rows.values()),
    )


def analyse(study: Study) -> Findings:
    """All figures and claims of the recipe."""
    scales = {name: arm for name, title in SCALES.items() if (arm := _arm(study, name, title)) is not None}
    grown = {name: arm for name, title in GROWN.items() if (arm := _arm(study, name, title)) is not None}
    if not scales and not grown:
        return Findings(notes=("No model was trained to the end with all seeds.",))
    rows = [arm.row("loss", "whole") for arm in scales.values()]
    rows += [arm.row("loss", "new text") for arm in grown.values()]
    rows += [arm.row(f"{OLD}/loss", "old text") for arm in grown.values()]
    lines = [_line(arm) for arm in scales.values() if arm.scales]
    alone = _alone_line(scales)
    if alone is not None:
        lines.append(alone)
    return Findings(
        rows=tuple(rows),
        claims=(*_scale_claims(scales), *_growth_claims(grown)),
        tables=tuple(table(found) for found, table in ((scales, _scale_table), (grown, _growth_table)) if found),
        plots=(
            Plot(
                title="Held-out loss by scale",
                x_label="chains",
                y_label=f"loss ({UNIT})",
                lines=tuple(lines),
            ),
        ),
    )
