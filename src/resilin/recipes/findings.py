"""What passes between the runner and an analysis: the records of runs in, figures and claims out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from resilin.config import Settings
from resilin.recipes.recipe import Value

Metrics = dict[str, float | None]
"""Measured quantities by name; None where a quantity was not finite."""


class Evaluation(Settings):
    """Metrics on held-out data after `step` updates."""

    step: int
    metrics: Metrics


class RunRecord(Settings):
    """What one finished run leaves: `record.json` in its folder."""

    hash: str
    status: Literal["finished", "non-finite"]
    stopped_at: int | None = None
    """The step whose loss or gradient was not finite."""
    evaluations: tuple[Evaluation, ...] = ()
    series: dict[str, tuple[tuple[int, float | None], ...]] = Field(default={})
    """Logged quantities: (step, value) in order of step."""
    parameters: int = 0
    non_embedding: int = 0
    wall_seconds: float = 0.0
    data_digest: str = ""
    code: str = ""
    """Of the package's source that made it (`resilin.recipes.code_digest`)."""
    weights: str = ""
    """A digest of the final weights (`resilin.models.digest`)."""
    settings: dict[str, Any] = Field(default={})

    @property
    def initial(self) -> Metrics:
        """Metrics before the first update."""
        return self.evaluations[0].metrics if self.evaluations else {}

    @property
    def final(self) -> Metrics:
        """Metrics of the last evaluation; a run that stopped at a non-finite loss has none."""
        return self.evaluations[-1].metrics if self.status == "finished" and self.evaluations else {}

    def value(self, name: str, step: int | None = None) -> float | None:
        """A series at its last point, or at the last one not after `step`."""
        points = [v for s, v in self.series.get(name, ()) if step is None or s <= step]
        return points[-1] if points else None


@dataclass(frozen=True, slots=True)
class Trial:
    """A cell of a grid and the run that filled it; several cells may share a run."""

    grid: str
    arm: str
    axes: dict[str, Value]
    seed: int
    record: RunRecord


@dataclass(frozen=True, slots=True)
class Study:
    """All trials of one preset."""

    slug: str
    preset: str
    trials: tuple[Trial, ...]
    recipe: Any
    """The `resilin.recipes.recipe.Recipe`."""

    def select(self, grid: str | None = None, arm: str | None = None, **axes: Value) -> tuple[Trial, ...]:
        """The trials of a grid, an arm and some axis values; what is not named may be anything."""
        return tuple(
            t
            for t in self.trials
            if grid in (None, t.grid) and arm in (None, t.arm) and all(t.axes.get(k) == v for k, v in axes.items())
        )

    def seeds(self) -> tuple[int, ...]:
        """Every seed used, in order."""
        return tuple(sorted({t.seed for t in self.trials}))


class Row(Settings):
    """A measured figure with its spread over seeds."""

    name: str
    value: float | None
    """Mean over seeds; None where it could not be measured."""
    spread: float | None = None
    """Sample standard deviation over seeds; None with fewer than two."""
    count: int = 1
    """How many seeds."""
    unit: str = ""
    paper: str = ""
    """The paper's figure beside it, as it states it."""

    @staticmethod
    def over_seeds(name: str, values: Sequence[float | None], unit: str = "", paper: str = "") -> Row:
        """Mean and standard deviation of one value per seed; values that are not finite make the row None."""
        finite = [v for v in values if v is not None and math.isfinite(v)]
        whole = bool(finite) and len(finite) == len(values)
        return Row(
            name=name,
            value=statistics.fmean(finite) if whole else None,
            spread=statistics.stdev(finite) if whole and len(finite) > 1 else None,
            count=len(values),
            unit=unit,
            paper=paper,
        )


class Claim(Settings):
    """A direction that the paper states, and whether these runs show it."""

    name: str
    statement: str
    holds: bool
    """Computed from the runs."""
    evidence: str
    """The figures it was computed from."""


class Table(Settings):
    """A table of the README; cells are printed with four significant digits."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]
    note: str = ""


class Line(Settings):
    """One line of a plot; points whose y is None are left out."""

    label: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    spread: tuple[float | None, ...] = ()


class Plot(Settings):
    """One panel of the picture."""

    title: str
    x_label: str
    y_label: str
    x_log: bool = False
    y_log: bool = False
    lines: tuple[Line, ...]


class Findings(Settings):
    """What an analysis says."""

    rows: tuple[Row, ...] = ()
    claims: tuple[Claim, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    notes: tuple[str, ...] = ()
    """Advice or caveats computed from the runs, one sentence each."""
