"""Watching the power law while a run goes on.

The loss of a step is measured before its update, so while data are new it is a validation loss that costs nothing.
At every step 2^(k/4) the average of recent losses becomes a point; the law is fitted again to the points after
warm-up and the first 5 % (before the learning rate decays). Where data repeat and the loss on them falls below the
held-out loss by more than 3 standard errors, the epoch boundary is over-fitted: time to stop or to get new data. A
held-out set that is harder than the training text by itself is allowed for: what it was above the loss on new data.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from resilin.planner.power_law import Departure, PowerLaw, departure, fit_power_law, middle
from resilin.run.events import Evaluated, Event, StepDone

POINTS_PER_OCTAVE = 4
HORIZON = 0.1  # the average reaches back over this share of the steps so far
FEWEST = 5  # points before a law is worth telling
SIGMAS = 3.0
WINDOW, FEWEST_RECENT = 200, 20  # steps whose losses are compared with a held-out loss


@dataclass(frozen=True, slots=True)
class Reading:
    """The law as it stands at a step.

    Attributes:
        step: steps committed.
        loss: average of recent losses.
        law: fitted to the points so far; None while there are too few.
        predicted_final: the loss at the last step if the law goes on (no learning-rate decay); None without a law.
        residual: log(measured / predicted) of this point by the law of the points before it; None without one.
    """

    step: int
    loss: float
    law: PowerLaw | None
    predicted_final: float | None
    residual: float | None

    def sentence(self) -> str:
        """One line for the user."""
        if self.law is None or self.predicted_final is None:
            return f"step {self.step}: loss {self.loss:.4f}; too few points for a power law"
        off = "" if self.residual is None else f", this point {self.residual:+.1%} off"
        floor = f" + {self.law.c:.3g}" if self.law.c else ""
        return (
            f"step {self.step}: loss {self.loss:.4f} = {self.law.a:.3g} t^-{self.law.k:.3f}{floor}{off}; "
            f"final loss {self.predicted_final:.4f}"
        )


@dataclass(frozen=True, slots=True)
class OverFitting:
    """Repeated data are learned by heart.

    Attributes:
        step: steps committed.
        online: loss on the repeated data.
        held_out: loss on held-out data.
        standard_errors: the gap between them, in standard errors.
    """

    step: int
    online: float
    held_out: float
    standard_errors: float

    def sentence(self) -> str:
        """One line for the user."""
        return (
            f"step {self.step}: epoch boundary over-fitting: the loss on repeated data ({self.online:.4f}) is "
            f"{self.standard_errors:.1f} standard errors below the held-out loss ({self.held_out:.4f}); "
            f"stop here or train on new data"
        )


@dataclass
class Monitor:
    """A listener on run events.

    Attributes:
        total_steps: I.
        steps_per_epoch: steps after which data repeat; None: they never do.
        warmup: steps of warm-up.
        decay_from: the step at which the learning rate begins to fall, beyond which points are not fitted.
        floor: whether the law has an irreducible part.
        tell: receives a line for each reading and finding.
        readings: so far.
        over_fitting: the first finding, or None.
        departures: where two points in a row left the law of the points before them, on one side.
    """

    total_steps: int
    steps_per_epoch: float | None = None
    warmup: int = 0
    decay_from: float | None = None
    floor: bool = False
    tell: Callable[[str], None] | None = None
    readings: list[Reading] = field(default_factory=list)
    over_fitting: OverFitting | None = None
    departures: list[Departure] = field(default_factory=list)
    _outside: Departure | None = None
    _points: list[tuple[float, float]] = field(default_factory=list)
    """(t, loss) of the averages that hold no step of the decay."""
    _mean_loss: float = 0.0
    _mean_log_step: float = 0.0
    _seen: int = 0
    _recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _repeating: bool = False
    _harder: tuple[float, float] = (0.0, 0.0)

    def __call__(self, event: Event) -> None:
        """Take an event of the run."""
        if isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, Evaluated) and event.name == "validation":  # of the data it trains on
            self._evaluated(event)

    @property
    def law(self) -> PowerLaw | None:
        """The newest law."""
        return self.readings[-1].law if self.readings else None

    def _step(self, event: StepDone) -> None:
        if not (math.isfinite(event.loss) and event.loss > 0):
            return
        self._seen += 1
        # Averaging log t with the same weights puts the averaged loss at the place on the law where it belongs.
        weight = 1 / max(1.0, min(self._seen, HORIZON * event.step))
        self._mean_loss += weight * (event.loss - self._mean_loss)
        self._mean_log_step += weight * (math.log(event.step) - self._mean_log_step)
        if not self._repeating and self.steps_per_epoch is not None and event.step > self.steps_per_epoch:
            self._repeating = True
            self._recent.clear()
        self._recent.append((math.log(event.step), event.loss))
        if _octave(event.step) > _octave(event.step - 1):
            self._point(event.step)

    def _point(self, step: int) -> None:
        place, residual = math.exp(self._mean_log_step), None
        before = self.law
        decaying = self.decay_from is not None and step > self.decay_from
        inside = place > max(self.warmup, 0.05 * self.total_steps) and not decaying
        if before is not None and inside:
            residual = before.residual(place, self._mean_loss)
            self._depart(step, departure(before, [place], [self._mean_loss], SIGMAS))
        if not decaying:
            self._points.append((place, self._mean_loss))
        times, losses = middle(
            [t for t, _ in self._points], [x for _, x in self._points], self.total_steps, self.warmup
        )
        law = fit_power_law(times, losses, self.floor) if len(times) >= FEWEST else None
        final = law.loss(self.total_steps) if law is not None else None
        reading = Reading(step, self._mean_loss, law, final, residual)
        self.readings.append(reading)
        self._say(reading.sentence())

    def _depart(self, step: int, found: Departure | None) -> None:
        """Confirm a departure at its second point; a single one is noise, and an early law is often mended."""
        before, self._outside = self._outside, found
        if before is None or found is None or before.above != found.above:
            return
        if self.departures and self.departures[-1].t == before.t:
            return
        self.departures.append(before)
        side = "above: over-fitting, or too high a rate" if found.above else "below: the law was fitted too early"
        self._say(f"step {step}: the loss leaves its power law at step {before.t:.0f} ({found.residual:+.1%}, {side})")

    def _evaluated(self, event: Evaluated) -> None:
        held_out = event.metrics.get("loss", math.nan)
        if self.over_fitting is not None or len(self._recent) < FEWEST_RECENT or not math.isfinite(held_out):
            return
        online, error = _now(self._recent)
        if not self._repeating:
            self._harder = max(0.0, held_out - online), error
            return
        allowed, its_error = self._harder
        gap, error = held_out - allowed - online, math.hypot(error, its_error)
        if gap > SIGMAS * error:
            self.over_fitting = OverFitting(event.step, online, held_out, gap / error if error else math.inf)
            self._say(self.over_fitting.sentence())

    def _say(self, sentence: str) -> None:
        if self.tell is not None:
            self.tell(sentence)


def _now(recent: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The loss at the last of some steps, and its standard error, from a line through (log step, loss).

    A mean over the window would be the loss of half a window ago, which is higher.
    """
    n = len(recent)
    x_mean, y_mean = sum(x for x, _ in recent) / n, sum(y for _, y in recent) / n
    spread = sum((x - x_mean) ** 2 for x, _ in recent)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in recent) / spread
    left = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in recent) / (n - 2)
    ahead = recent[-1][0] - x_mean
    return y_mean + slope * ahead, math.sqrt(left * (1 / n + ahead**2 / spread))


def _octave(step: int) -> int:
    """How many of the steps 2^(k/4) lie at or below `step`."""
    return 0 if step < 1 else 1 + math.floor(POINTS_PER_OCTAVE * math.log2(step) + 1e-9)
