"""How a run ended, of the events that it told: for whoever only listened."""

from __future__ import annotations

from resilin.run.events import Evaluated, Event, RunEnded, Saved, StepDone
from resilin.run.run import Outcome


class ToldOutcome:
    """A listener.

    Attributes:
        outcome: once the run has ended.
    """

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self._metrics: dict[str, float] = {}
        self._saved: str | None = None

    def __call__(self, event: Event) -> None:
        """One more event."""
        if isinstance(event, StepDone):
            self._metrics["loss"] = event.loss
        elif isinstance(event, Evaluated):
            self._metrics |= {f"{event.name}/{key}": value for key, value in event.metrics.items()}
        elif isinstance(event, Saved):
            self._saved = event.path
        elif isinstance(event, RunEnded) and event.reason in ("completed", "interrupted", "failed"):
            self.outcome = Outcome(event.reason, event.step, self._metrics, self._saved)  # type: ignore[arg-type]
