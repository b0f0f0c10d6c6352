"""The numbers of a run that a person watches: smoothed loss, throughput, time left."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

from resilin.run.events import Evaluated, Event, RunStarted, Saved, StepDone

_WINDOW = 256
_SMOOTHING = 0.95


def amount(value: float, unit: str = "") -> str:
    """A large number in three digits: 950, 12.3k, 4.56M; with a unit 180 GFLOP/s, 61.0 MB."""
    letters = ("", "k", "M", "G", "T", "P")
    place = 0
    while abs(value) >= 999.5 and place < len(letters) - 1:
        value, place = value / 1000, place + 1
    exact = place == 0 and value == int(value)
    digits = 0 if exact else max(0, 2 - int(math.log10(max(abs(value), 1.0))))
    return f"{value:.{digits}f}{' ' if unit else ''}{letters[place]}{unit}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:07, 12:05, 3:04:05, 2d 3:04:05."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours or days else f"{minutes}:{seconds:02d}"
    return f"{days}d {clock}" if days else clock


def numbers(metrics: Mapping[str, float], limit: int = 4) -> str:
    """The first few metrics in a line."""
    shown = [f"{name} {value:.4g}" for name, value in list(metrics.items())[:limit]]
    return "  ".join(shown) + (f"  (+{len(metrics) - limit} more)" if len(metrics) > limit else "")


class RunProgress:
    """What the events so far add up to; knows nothing of terminals.

    Attributes:
        step, total: committed steps, and when the run is complete.
        last: the newest step event.
        evaluated: the newest evaluation, by name.
        saved: the newest checkpoint.
    """

    def __init__(self) -> None:
        self.step = self.total = 0
        self.unit = "tokens"
        self.last: StepDone | None = None
        self.evaluated: dict[str, Evaluated] = {}
        self.saved: Saved | None = None
        self._loss = self._weight = 0.0
        self._window: deque[StepDone] = deque(maxlen=_WINDOW)

    def see(self, event: Event) -> None:
        """Take one more event into account."""
        if isinstance(event, RunStarted):
            self.step, self.total, self.unit = event.start_step, event.total_steps, event.unit
            self._window.clear()
        elif isinstance(event, StepDone):
            self.step, self.last = event.step, event
            self._window.append(event)
            if math.isfinite(event.loss):
                self._loss = _SMOOTHING * self._loss + (1 - _SMOOTHING) * event.loss
                self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        elif isinstance(event, Evaluated):
            self.evaluated[event.name] = event
        elif isinstance(event, Saved):
            self.saved = event

    @property
    def loss(self) -> float:
        """Moving average over about 20 steps, without a bias towards zero at the start; NaN before any step."""
        return self._loss / self._weight if self._weight else math.nan

    @property
    def units_per_second(self) -> float:
        """Mean over the last steps, evaluation and saving left out; the first step, with its warm-up, as well."""
        steps = list(self._window)
        steps = steps[1:] or steps
        seconds = sum(event.seconds for event in steps)
        return sum(event.units for event in steps) / seconds if seconds > 0 else math.nan

    @property
    def mfu(self) -> float | None:
        """Mean share of the measured peak, over the same steps as the throughput."""
        if self.last is None or self.last.mfu is None or self.last.units_per_second == 0:
            return None
        return self.last.mfu / self.last.units_per_second * self.units_per_second

    @property
    def seconds_left(self) -> float:
        """At the pace of the last steps, evaluation and saving included; NaN until two steps are done."""
        if len(self._window) < 2:
            return math.nan
        first, last = self._window[0], self._window[-1]
        if last.step <= first.step:
            return math.nan
        return (self.total - self.step) * (last.time - first.time) / (last.step - first.step)

    def pace(self) -> str:
        """Loss, learning rate, throughput and MFU in a line; empty before any step."""
        if self.last is None:
            return ""
        parts = [f"loss {self.loss:.4f}", f"lr {self.last.lr:.2e}", f"grad norm {self.last.grad_norm:.3g}"]
        if math.isfinite(self.units_per_second):
            parts.append(f"{amount(self.units_per_second)} {self.unit}/s")
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.{0 if self.mfu >= 0.1 else 1}%}")
        return "  ".join(parts)

    def time_left(self) -> str:
        """The time left in words."""
        return duration(self.seconds_left) if math.isfinite(self.seconds_left) else "-:--"
