"""Numbers by step, thinned out for a screen: what stands out stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from resilin.dashboard.step_lines import COLUMNS, Columns

Floats = npt.NDArray[np.float64]
SHOWN = ("loss", "throughput", "seconds", "grad_norm")
"""The curves there are: loss, units/s, s for a step, norm before clipping."""
_FIRST = 1 << 12


class Steps:
    """The committed steps of a run, in order.

    Attributes:
        count: how many there are.
    """

    def __init__(self) -> None:
        self._data: Floats = np.empty((len(COLUMNS), _FIRST))
        self.count = 0

    def add(self, columns: Columns) -> None:
        """More steps, each of which takes the place of an older one of its number."""
        rows = columns
        steps = rows[COLUMNS.index("step")]
        if steps.size > 1 and bool((np.diff(steps) <= 0).any()):
            rows = rows[:, _standing(steps)]
            steps = rows[COLUMNS.index("step")]
        self.cut(float(steps[0]) - 1)
        needed = self.count + rows.shape[1]
        if needed > self._data.shape[1]:
            grown = np.empty((len(COLUMNS), max(needed, 2 * self._data.shape[1])))
            grown[:, : self.count] = self._data[:, : self.count]
            self._data = grown
        self._data[:, self.count : needed] = rows
        self.count = needed

    def cut(self, step: float) -> None:
        """Forget what comes after a step: a resume has taken it back."""
        if self.count and self["step"][-1] > step:
            self.count = int(np.searchsorted(self["step"], step, side="right"))

    def __getitem__(self, name: str) -> Floats:
        """(count,) a column of `COLUMNS`, or "throughput"."""
        if name == "throughput":
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.where(self["seconds"] > 0, self["units"] / self["seconds"], np.nan)
        return self._data[COLUMNS.index(name), : self.count]

    def last(self) -> dict[str, float] | None:
        """The newest step; None: there is none."""
        return {name: float(self[name][-1]) for name in COLUMNS} if self.count else None


def _standing(steps: Floats) -> npt.NDArray[np.intp]:
    """Places of the steps that no later line takes back: those below all that follow."""
    later = np.minimum.accumulate(steps[::-1])[::-1]
    return np.flatnonzero(np.append(steps[:-1] < later[1:], True))


def thinned(steps: Steps, name: str, by: str, low: float, high: float, points: int) -> tuple[Floats, Floats]:
    """A curve in at most so many points: of every stretch of neighbours the lowest and the highest.

    Args:
        steps: of the run.
        name: one of `SHOWN`.
        by: "step" or "time" (seconds since 1970): what goes to the right.
        low: the least of that which is seen; one step more on either side is given, so that lines reach the edge.
        high: the most.
        points: at least 4.

    Returns:
        x and y; NaN where a value is not finite.
    """
    x = steps[by]
    first = max(0, int(np.searchsorted(x, low)) - 1)
    last = min(x.size, int(np.searchsorted(x, high, side="right")) + 1)
    x, y = x[first:last], steps[name][first:last]
    y = np.where(np.isfinite(y), y, np.nan)
    if x.size <= points:
        return x.copy(), y
    bounds = np.linspace(0, x.size, points // 2 + 1).astype(np.intp)
    least = _places(np.where(np.isnan(y), np.inf, y), bounds)
    most = _places(np.where(np.isnan(y), np.inf, -y), bounds)
    places = np.unique(np.concatenate([least, most]))
    return x[places], y[places]


def _places(values: Floats, bounds: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Of each stretch [bounds[i], bounds[i + 1]) the first place of its least value."""
    least = np.minimum.reduceat(values, bounds[:-1])
    same = np.flatnonzero(values == np.repeat(least, np.diff(bounds)))
    stretch = np.searchsorted(bounds, same, side="right") - 1
    return same[np.unique(stretch, return_index=True)[1]]


def means(steps: Steps, name: str, by: str, low: float, high: float, points: int) -> tuple[Floats, Floats]:
    """A curve without its noise: means over stretches of neighbours, at their middles.

    Args:
        steps: of the run.
        name: one of `SHOWN`.
        by: see `thinned`.
        low: see `thinned`.
        high: see `thinned`.
        points: how many stretches; nothing is given where each would be of fewer than four steps.
    """
    x = steps[by]
    first, last = int(np.searchsorted(x, low)), int(np.searchsorted(x, high, side="right"))
    x, y = x[first:last], steps[name][first:last]
    if x.size < 4 * points:
        return x[:0], y[:0]
    bounds = np.linspace(0, x.size, points + 1).astype(np.intp)[:-1]
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite.astype(np.float64), bounds)
    sums = np.add.reduceat(np.where(finite, y, 0.0), bounds)
    with np.errstate(invalid="ignore"):
        return np.add.reduceat(x, bounds) / np.diff(np.append(bounds, x.size)), sums / counts


def as_json(values: Floats, digits: int = 6) -> list[float | None]:
    """Numbers for JSON, with so many digits; None where one is not finite."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]


def curves(steps: Steps, by: str, low: float, high: float, points: int) -> dict[str, Any]:
    """All of `SHOWN`, each with its means, as JSON values; see `thinned` and `means`."""
    found = {}
    for name in SHOWN:
        x, y = thinned(steps, name, by, low, high, points)
        middles, values = means(steps, name, by, low, high, max(8, points // 16))
        found[name] = {
            "x": as_json(x, 15),
            "y": as_json(y),
            "mean": {"x": as_json(middles, 15), "y": as_json(values)},
        }
    return found
