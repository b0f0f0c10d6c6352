"""The analysis of the recipe `loopformer`: held-out loss at every number of loops, of LoopFormer and its baselines."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass

from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, Study, Table, Trial
from resilin.recipes.gains import share_claim

TITLES = {
    "loopformer": "LoopFormer",
    "base_loop": "plain loop, trained at all loops alone",
    "early_exit": "plain loop, early exits",
    "told_alone": "told time and step, without short trajectories",
    "unshared": "as many blocks of their own",
}
PAPER = {"loopformer": "perplexity 10.28", "base_loop": "perplexity 10.91", "unshared": "perplexity 9.49"}
UNIT = "nat/token"
AT_HALF, AT_ONE, AT_ALL = 0.10, 0.30, 0.02
"""Shares of the plain loop's loss: least gain at half the loops and at one, most cost at all of them."""


@dataclass(frozen=True, slots=True)
class _Arm:
    """One kind of model over the seeds."""

    name: str
    trials: tuple[Trial, ...]
    loops: int

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of equal loops that were read, ascending."""
        names = (name.removeprefix("loss_at_") for name in self.trials[0].record.final if name.startswith("loss_at_"))
        return tuple(sorted(int(name) for name in names if name.isdecimal()))

    @property
    def trajectories(self) -> tuple[str, ...]:
        """Those of unequal steps."""
        names = (name.removeprefix("loss_at_") for name in self.trials[0].record.final if name.startswith("loss_at_"))
        return tuple(sorted((name for name in names if "+" in name), reverse=True))

    def at(self, trajectory: int | str, paper: str = "") -> Row:
        """The loss at so many loops, or with these steps."""
        values = [trial.record.final.get(f"loss_at_{trajectory}") for trial in self.trials]
        what = f"{trajectory} loops" if isinstance(trajectory, int) else f"steps {trajectory}"
        return Row.over_seeds(f"loss, {TITLES[self.name]}, {what}", values, UNIT, paper)

    @property
    def whole(self) -> Row:
        """The loss of the whole model."""
        values = [trial.record.final.get("loss") for trial in self.trials]
        return Row.over_seeds(f"loss, {TITLES[self.name]}, whole", values, UNIT, PAPER.get(self.name, ""))


def _arm(study: Study, name: str) -> _Arm | None:
    trials = study.select(arm=name)
    done = tuple(trial for trial in trials if trial.record.status == "finished" and trial.record.evaluations)
    if not done or len(done) < len(trials):
        return None
    loop = done[0].record.settings["model"].get("loop") or {}
    return _Arm(name, done, int(loop.get("times", 1)))


def _value(row: Row) -> float:
    return math.nan if row.value is None else row.value


def _seeds(arm: _Arm, other: _Arm, trajectory: int | str, other_at: int | str) -> list[float]:
    """The loss of one as a share of that of the other, seed by seed."""
    pairs = zip(arm.trials, other.trials, strict=True)
    found = []
    for mine, theirs in pairs:
        one, two = mine.record.final.get(f"loss_at_{trajectory}"), theirs.record.final.get(f"loss_at_{other_at}")
        found.append(math.nan if one is None or two is None else one / two)
    return found


def _claims(arms: dict[str, _Arm]) -> list[Claim]:
    found: list[Claim] = []
    mine = arms.get("loopformer")
    if mine is None:
        return found
    trained = [count for count in mine.counts if count <= mine.loops]
    losses = [_value(mine.at(count)) for count in trained]
    falls = all(after < before for before, after in itertools.pairwise(losses))
    listed = ", ".join(f"{count}: {loss:.4f}" for count, loss in zip(trained, losses, strict=True))
    found.append(
        Claim(
            name="every loop helps",
            statement="LoopFormer's loss falls with every further loop, up to all of them",
            holds=falls,
            evidence=listed,
        )
    )
    base = arms.get("base_loop")
    if base is not None:
        for count in (count for count in trained if count <= mine.loops // 2):
            gain = AT_ONE if count == 1 else AT_HALF
            found.append(
                share_claim(
                    f"{count} of {mine.loops} loops",
                    f"with {count} of {mine.loops} loops it is at least {gain:.0%} below the plain loop",
                    _seeds(mine, base, count, count),
                    1 - gain,
                )
            )
        found.append(
            share_claim(
                "all loops",
                f"with all loops it is at most {AT_ALL:.0%} above the plain loop",
                _seeds(mine, base, mine.loops, mine.loops),
                1 + AT_ALL,
            )
        )
    control = arms.get("told_alone")
    half = max(mine.loops // 2, 1)
    if control is not None and half in mine.counts:
        found.append(
            share_claim(
                "short trajectories have to be trained",
                f"with {half} of {mine.loops} loops it is below a model that is told the same and was not trained at "
                "short trajectories",
                _seeds(mine, control, half, half),
                1 - 1e-9,
            )
        )
    early = arms.get("early_exit")
    if early is not None:
        found.append(
            share_claim(
                "early exits",
                "with all loops it is below a plain loop that was trained with the same short terms",
                _seeds(mine, early, mine.loops, mine.loops),
                1 - 1e-9,
            )
        )
    uneven = mine.trajectories
    if len(uneven) > 1:
        found.append(
            share_claim(
                "coarse early",
                f"large early steps ({uneven[0]}) are better than large late ones ({uneven[-1]})",
                _seeds(mine, mine, uneven[0], uneven[-1]),
                1 - 1e-9,
            )
        )
    return found


def _table(arms: dict[str, _Arm]) -> Table:
    columns = sorted({count for arm in arms.values() for count in arm.counts if arm.name != "unshared"})
    rows = []
    for arm in arms.values():
        cells: list[float | str | int | None] = [TITLES[arm.name], arm.trials[0].record.non_embedding]
        if arm.name == "unshared":
            most = max((other.loops for other in arms.values()), default=1)
            cells += [arm.whole.value if count == most else None for count in columns]
        else:
            cells += [arm.at(count).value if count in arm.counts else None for count in columns]
        rows.append(tuple(cells))
    return Table(
        title="Held-out loss by number of loops, mean over seeds",
        columns=("model", "parameters without embedding", *(f"{count} loops" for count in columns)),
        rows=tuple(rows),
        note="Blocks of their own stand in the column of the same operations.",
    )


def _line(arm: _Arm) -> Line:
    rows = [arm.at(count) for count in arm.counts]
    return Line(
        label=TITLES[arm.name],
        x=tuple(float(count) for count in arm.counts),
        y=tuple(row.value for row in rows),
        spread=tuple(row.spread for row in rows),
    )


def _consistency(arm: _Arm) -> Line:
    """The mean over seeds of means of some steps."""
    width = 20
    curves = []
    for trial in arm.trials:
        values = [value for _, value in trial.record.series.get("consistency_relative", ()) if value is not None]
        means = [statistics.fmean(values[at : at + width]) for at in range(0, len(values) - width + 1, width)]
        curves.append(means)
    count = min(map(len, curves))
    return Line(
        label=TITLES[arm.name],
        x=tuple(float((at + 1) * width) for at in range(count)),
        y=tuple(statistics.fmean(curve[at] for curve in curves) for at in range(count)),
    )


def analyse(study: Study) -> Findings:
    """All figures and claims of the recipe."""
    arms = {name: arm for name in TITLES if (arm := _arm(study, name)) is not None}
    if not arms:
        return Findings(notes=("No model was trained to the end with all seeds.",))
    rows = [arm.whole for arm in arms.values()]
    plots = [
        Plot(
            title="Held-out loss by number of loops",
            x_label="loops",
            y_label=f"loss ({UNIT})",
            lines=tuple(_line(arm) for name, arm in arms.items() if name != "unshared"),
        )
    ]
    mine = arms.get("loopformer")
    if mine is not None:
        rows += [mine.at(steps) for steps in mine.trajectories]
        if mine.trials[0].record.series.get("consistency_relative"):
            short = [arm for name, arm in arms.items() if name in ("loopformer", "early_exit")]
            plots.append(
                Plot(
                    title="Distance of short trajectories from the full one",
                    x_label="step",
                    y_label="squared error / squared states",
                    y_log=True,
                    lines=tuple(_consistency(arm) for arm in short),
                )
            )
    notes = []
    beyond = [] if mine is None else [count for count in mine.counts if count > mine.loops]
    if mine is not None and beyond:
        notes.append(f"{', '.join(map(str, beyond))} loops are more than any model was trained at.")
    return Findings(
        rows=tuple(rows),
        claims=tuple(_claims(arms)),
        tables=(_table(arms),),
        plots=tuple(plots),
        notes=tuple(notes),
    )
