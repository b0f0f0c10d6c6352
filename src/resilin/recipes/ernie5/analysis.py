"""The analysis of the recipe `ernie5`: held-out losses of whole and smaller models, of elastic and plain training."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, Study, Table, Trial
from resilin.recipes.gains import share_claim

TITLES = {
    "plain": "trained plainly",
    "elastic": "elastic along three axes",
    "fifth": "elastic, fewer layers in a fifth of the steps",
    "depth": "elastic depth alone",
    "width": "elastic width alone",
    "sparsity": "elastic sparsity alone",
    "small": "the smallest size by itself, as many operations",
}
UNITS = {"digits": "nat/digit", "text": "nat/byte"}
HALF, COST = 0.5, 1.15
"""Of the plain model's loss: the most that is asked for at one choice and along all axes, and of the whole model."""
BIND = {"depth": "skip=", "width": "experts=", "sparsity": "top_k="}
"""How budgets that are smaller along one axis alone begin."""


@dataclass(frozen=True, slots=True)
class _Arm:
    """One kind of training over the seeds."""

    grid: str
    name: str
    trials: tuple[Trial, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The budgets that were read, in the order of the settings."""
        found: list[str] = self.trials[0].record.settings["objective"].get("evaluated", [])
        return tuple(found)

    def values(self, text: str) -> list[float]:
        """The loss at a budget ("": of the whole model), seed by seed."""
        return self.measured(f"loss_at_{text}" if text else "loss")

    def measured(self, name: str) -> list[float]:
        """A metric of the end, seed by seed."""
        found = [trial.record.final.get(name) for trial in self.trials]
        return [math.nan if one is None else one for one in found]

    def mean(self, name: str) -> float:
        """A metric's mean over seeds."""
        return statistics.fmean(self.measured(name))

    def row(self, text: str) -> Row:
        """The loss at a budget as a figure."""
        what = f"loss on {self.grid}, {TITLES[self.name]}, {text or 'whole'}"
        return Row.over_seeds(what, self.values(text), UNITS[self.grid])


def _arm(study: Study, grid: str, name: str) -> _Arm | None:
    trials = study.select(grid=grid, arm=name)
    done = tuple(trial for trial in trials if trial.record.status == "finished" and trial.record.evaluations)
    return _Arm(grid, name, done) if done and len(done) == len(trials) else None


def _on_average(name: str, statement: str, mine: list[float], theirs: list[float], most: float) -> Claim:
    """Whether the mean over seeds of one is at most such a share of the other's."""
    share = statistics.fmean(mine) / statistics.fmean(theirs)
    seeds = ", ".join(f"{one / other:.3f}" for one, other in zip(mine, theirs, strict=True))
    return share_claim(name, statement, [share], most, f" of it on average ({seeds} by seed)")


def _seed_by_seed(name: str, statement: str, mine: list[float], theirs: list[float]) -> Claim:
    shares = [one / other for one, other in zip(mine, theirs, strict=True)]
    return share_claim(name, statement, shares, 1 - 1e-9)


def _of_digits(arms: dict[str, _Arm]) -> list[Claim]:
    """What the experiment is required to show."""
    plain, mine = arms.get("plain"), arms.get("elastic")
    if plain is None or mine is None:
        return []
    whole = _on_average(
        "whole model",
        f"on digits the whole elastic model's loss is at most {COST - 1:.0%} above the plain model's",
        mine.values(""),
        plain.values(""),
        COST,
    )
    found = [whole]
    for name, text in (("one choice", "top_k=1"), ("all axes", plain.texts[-1])):
        if text in plain.texts:
            statement = f"on digits, with {text}, it is at most half of the plain model's"
            found.append(_on_average(name, statement, mine.values(text), plain.values(text), HALF))
    for axis, begins in BIND.items():
        alone = arms.get(axis)
        texts = [text for text in plain.texts if text.startswith(begins) and "," not in text]
        if alone is not None and texts:
            statement = f"on digits, elastic {axis} alone is below plain training with {texts[-1]}"
            found.append(_seed_by_seed(f"{axis} alone", statement, alone.values(texts[-1]), plain.values(texts[-1])))
    return found


def _of_text(arms: dict[str, _Arm]) -> list[Claim]:
    plain, mine = arms.get("plain"), arms.get("elastic")
    if plain is None or mine is None:
        return []
    return [
        _seed_by_seed(
            f"text, {text}",
            f"on text, with {text}, the elastic model's loss is below the plain model's",
            mine.values(text),
            plain.values(text),
        )
        for text in plain.texts
    ]


def _losses(grid: str, arms: dict[str, _Arm]) -> Table:
    """The grid of losses; the small model stands in the column of its size."""
    texts = arms["plain"].texts if "plain" in arms else next(iter(arms.values())).texts
    rows = []
    for arm in arms.values():
        cells: list[str | float | None] = [TITLES[arm.name]]
        if arm.texts:
            cells += [statistics.fmean(arm.values(text)) for text in ("", *texts)]
        else:
            cells += [None] * len(texts) + [statistics.fmean(arm.values(""))]
        base = arms.get("elastic", arm)
        cells.append(arm.mean("measured/cost/flops of the run") / base.mean("measured/cost/flops of the run"))
        rows.append(tuple(cells))
    small = "" if "small" not in arms else "The small model stands in the column of its size. "
    return Table(
        title=f"Held-out loss on {grid} ({UNITS[grid]}), mean over seeds",
        columns=("training", "whole", *texts, "operations of the run"),
        rows=tuple(rows),
        note=f"{small}Operations are those of the elastic run.",
    )


def _sizes(arm: _Arm) -> Table:
    """What each budget costs."""
    kinds = ("flops", "parameters")
    whole = [arm.mean(f"measured/cost/{what}") for what in kinds]
    rows: list[tuple[str | float | int | None, ...]] = [("whole", 1.0, 1.0)]
    rows += [
        (
            text,
            arm.mean(f"measured/cost/flops/{text}") / whole[0],
            arm.mean(f"measured/cost/parameters/{text}") / whole[1],
        )
        for text in arm.texts
    ]
    return Table(
        title="What the smaller models cost, as a share of the whole",
        columns=("budget", "operations of a token", "parameters"),
        rows=tuple(rows),
    )


def _choice(grid: str, arms: dict[str, _Arm]) -> Table | None:
    """What choosing experts and layers on held-out data gains on other held-out data."""
    names = ("best plan, most used", "worst plan, most used", "best plan, first")
    rows = []
    for arm in arms.values():
        values = [arm.mean(f"measured/deployed/{name}") for name in names]
        if not any(map(math.isnan, values)):
            rows.append((TITLES[arm.name], *values))
    if not rows:
        return None
    return Table(
        title=f"The smallest size on {grid}, chosen on one half of the held-out data, read on the other",
        columns=("training", "best layers, most used experts", "worst layers", "best layers, first experts"),
        rows=tuple(rows),
    )


def _use(arms: dict[str, _Arm]) -> list[Table]:
    """Normalised entropy and overlap, by layer, of both kinds of training."""
    found = []
    for what, title in (
        ("entropy", "Normalised entropy of the loads of experts (1: all alike)"),
        ("overlap", "Overlap of the most used quarter of the experts of two domains (intersection over union)"),
    ):
        rows: list[tuple[str | float | int | None, ...]] = []
        layers = 0
        for arm in arms.values():
            start = f"measured/use/{what}/"
            names = [key.removeprefix(start) for key in arm.trials[0].record.final if key.startswith(start)]
            layers = max([layers, *(int(name.rpartition("/")[2]) + 1 for name in names)])
            for label in dict.fromkeys(name.rpartition("/")[0] for name in names):
                means = [arm.mean(f"{start}{label}/{layer}") for layer in range(layers)]
                rows.append((TITLES[arm.name], label, *means))
        if rows:
            columns = ("training", "text", *(f"layer {layer}" for layer in range(layers)))
            found.append(Table(title=title, columns=columns, rows=tuple(rows)))
    return found


def _plot(grid: str, arms: dict[str, _Arm]) -> Plot | None:
    """Loss against operations of a token, of the whole and of each smaller model."""
    lines = []
    for name in ("plain", "elastic"):
        arm = arms.get(name)
        if arm is None:
            return None
        whole = arm.mean("measured/cost/flops")
        points = [(1.0, arm.row(""))]
        points += [(arm.mean(f"measured/cost/flops/{text}") / whole, arm.row(text)) for text in arm.texts]
        points.sort(key=lambda point: point[0])
        lines.append(
            Line(
                label=TITLES[name],
                x=tuple(x for x, _ in points),
                y=tuple(row.value for _, row in points),
                spread=tuple(row.spread for _, row in points),
            )
        )
    return Plot(
        title=f"Held-out loss on {grid}",
        x_label="operations of a token, share of the whole model's",
        y_label=f"loss ({UNITS[grid]})",
        lines=tuple(lines),
    )


def analyse(study: Study) -> Findings:
    """All figures and claims of the recipe."""
    grids = {grid: {name: arm for name in TITLES if (arm := _arm(study, grid, name)) is not None} for grid in UNITS}
    grids = {grid: arms for grid, arms in grids.items() if arms}
    if not grids:
        return Findings(notes=("No model was trained to the end with all seeds.",))
    tables: list[Table] = []
    for grid, arms in grids.items():
        tables.append(_losses(grid, arms))
        if "elastic" in arms:
            tables.append(_sizes(arms["elastic"]))
        if (choice := _choice(grid, arms)) is not None:
            tables.append(choice)
        tables += _use(arms)
    plots = [plot for grid, arms in grids.items() if (plot := _plot(grid, arms)) is not None]
    ends = [
        arm.row(text)
        for arms in grids.values()
        for arm in arms.values()
        if arm.name in ("plain", "elastic", "small")
        for text in ("", *arm.texts[-1:])
    ]
    return Findings(
        rows=tuple(ends),
        claims=(*_of_digits(grids.get("digits", {})), *_of_text(grids.get("text", {}))),
        tables=tuple(tables),
        plots=tuple(plots),
    )
