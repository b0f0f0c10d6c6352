"""The analysis of the recipe `bone`: adapters of equal size on a shifted task, each at its best learning rate.

The grid `adapt` has an arm for each method and an axis `lr`. The best learning rate of an arm is the one with the
lowest mean held-out loss; all further figures of the arm are at that rate.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, RunRecord, Study, Table, Trial
from resilin.recipes.recipe import Value

TITLES = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "miss": "MiSS",
    "bat_col": "Bat (bat_col)",
    "bat_row": "Bone-row (bat_row)",
}
EARLY = (40, 60)
"""Steps over which "quick start" is measured."""
UNIT = "nat/byte"


def early_loss(record: RunRecord) -> float:
    """The mean training loss of the steps of `EARLY`."""
    first, last = EARLY
    return statistics.fmean(v for step, v in record.series["loss"] if first <= step <= last and v is not None)


@dataclass(frozen=True, slots=True)
class _Arm:
    """One method at its best learning rate."""

    name: str
    lr: Value
    trials: tuple[Trial, ...]
    by_lr: dict[Value, float]
    at_edge: bool

    def row(self, what: str, values: list[float | None], paper: str = "") -> Row:
        return Row.over_seeds(f"{what}, {TITLES.get(self.name, self.name)}", values, UNIT, paper)

    @property
    def target(self) -> Row:
        return self.row("test loss on the new task", [t.record.final["loss"] for t in self.trials])

    @property
    def original(self) -> Row:
        return self.row("loss on the old task afterwards", [t.record.final["original"] for t in self.trials])

    @property
    def early(self) -> Row:
        first, last = EARLY
        return self.row(f"training loss at steps {first} to {last}", [early_loss(t.record) for t in self.trials])

    @property
    def trainable(self) -> int:
        return self.trials[0].record.parameters


def _arm(study: Study, name: str) -> _Arm | None:
    trials = [t for t in study.select("adapt", name) if t.record.status == "finished" and t.record.evaluations]
    rates = sorted({t.axes["lr"] for t in trials}, key=float)
    seeds = len({t.seed for t in study.select("adapt", name)})
    mean: dict[Value, float] = {}
    for lr in rates:
        losses = [t.record.final.get("loss") for t in trials if t.axes["lr"] == lr]
        finite = [loss for loss in losses if loss is not None]
        if len(finite) == seeds:  # a rate at which a seed failed is not a choice
            mean[lr] = statistics.fmean(finite)
    if not mean:
        return None
    best = min(mean, key=lambda lr: mean[lr])
    chosen = tuple(t for t in trials if t.axes["lr"] == best)
    return _Arm(name, best, chosen, mean, best in (rates[0], rates[-1]) and len(rates) > 1)


def _error(a: Row, b: Row) -> float:
    """Standard error of the difference of two means."""
    return math.sqrt(sum((row.spread or 0.0) ** 2 / row.count for row in (a, b)))


def _lower(name: str, statement: str, a: Row, b: Row, *, at_most: bool = False) -> Claim:
    """A is below b by more than the standard error; with `at_most`, a is not above b by more than that."""
    one, other, error = a.value or math.inf, b.value or -math.inf, _error(a, b)
    holds = one - other <= error if at_most else other - one > error
    evidence = f"{one:.4f} against {other:.4f}, standard error of the difference {error:.4f}, {a.count} seeds"
    return Claim(name=name, statement=statement, holds=holds, evidence=evidence)


def _claims(arms: dict[str, _Arm]) -> list[Claim]:
    claims = []

    def both(a: str, b: str) -> bool:
        return a in arms and b in arms

    if both("miss", "lora"):
        claims.append(
            _lower(
                "quick start",
                f"at steps {EARLY[0]} to {EARLY[1]} the training loss of MiSS is below LoRA's",
                arms["miss"].early,
                arms["lora"].early,
            )
        )
    if both("bat_col", "miss"):
        claims.append(
            _lower(
                "bat <= miss",
                "multiplying the weight's own tiles ends at a test loss no higher than only adding a block",
                arms["bat_col"].target,
                arms["miss"].target,
                at_most=True,
            )
        )
    for baseline in ("lora", "rslora", "dora"):
        if both("bat_col", baseline):
            claims.append(
                _lower(
                    f"bat < {baseline}",
                    f"Bat ends at a lower test loss than {TITLES[baseline]} of the same size",
                    arms["bat_col"].target,
                    arms[baseline].target,
                )
            )
    if both("miss", "lora"):
        claims.append(
            _lower(
                "miss < lora",
                "MiSS ends at a lower test loss than LoRA of the same size",
                arms["miss"].target,
                arms["lora"].target,
            )
        )
    for method in ("miss", "bat_col"):
        if both(method, "lora"):
            claims.append(
                _lower(
                    f"{method} forgets more than lora",
                    f"after adaptation the old task's loss is higher with {TITLES[method]} than with LoRA",
                    arms["lora"].original,
                    arms[method].original,
                )
            )
    return claims


def _table(arms: dict[str, _Arm]) -> Table:
    rates = sorted({lr for arm in arms.values() for lr in arm.by_lr}, key=float)
    return Table(
        title="Test loss on the new task by learning rate, mean over seeds",
        columns=("method", "parameters with the base", *(f"lr {float(lr):g}" for lr in rates)),
        rows=tuple(
            (TITLES.get(name, name), arm.trainable, *(arm.by_lr.get(lr) for lr in rates)) for name, arm in arms.items()
        ),
    )


def _curve(arm: _Arm) -> Line:
    """The mean training loss over seeds, in means of ten steps."""
    seeds = [[(s, v) for s, v in t.record.series["loss"] if v is not None] for t in arm.trials]
    width = 10
    means = [
        [statistics.fmean(v for _, v in points[i : i + width]) for i in range(0, len(points) - width + 1, width)]
        for points in seeds
    ]
    count = min(map(len, means))
    y = tuple(statistics.fmean(column[i] for column in means) for i in range(count))
    return Line(label=f"{TITLES.get(arm.name, arm.name)}, lr {float(arm.lr):g}", x=_ends(count, width), y=y)


def _ends(count: int, width: int) -> tuple[float, ...]:
    return tuple(float((i + 1) * width) for i in range(count))


def analyse(study: Study) -> Findings:
    """All figures and claims of the recipe."""
    arms = {name: arm for name in TITLES if (arm := _arm(study, name)) is not None}
    if not arms:
        return Findings(notes=("No method finished.",))
    first = next(iter(arms.values())).trials[0].record.initial
    start = (
        Row(name="loss on the new task before adaptation", value=first.get("loss"), unit=UNIT),
        Row(name="loss on the old task before adaptation", value=first.get("original"), unit=UNIT),
    )
    rows = [*start]
    for what in ("target", "early", "original"):
        rows += [getattr(arm, what) for arm in arms.values()]
    notes = [
        f"The best learning rate of {TITLES[name]}, {float(arm.lr):g}, is at the edge of the grid: a wider one might "
        "help it."
        for name, arm in arms.items()
        if arm.at_edge
    ]
    plot = Plot(
        title="Training loss on the new task, best learning rate",
        x_label="step",
        y_label=f"training loss ({UNIT})",
        lines=tuple(_curve(arm) for arm in arms.values()),
    )
    return Findings(
        rows=tuple(rows), claims=tuple(_claims(arms)), tables=(_table(arms),), plots=(plot,), notes=tuple(notes)
    )
