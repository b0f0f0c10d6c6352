"""A trial of a layout, and how it went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from resilin.planner.tune.features import Hint

Status = Literal["ok", "oom", "crash", "timeout"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial went.

    Attributes:
        status: ok, or why it failed.
        rate: tokens a second; 0 where it failed.
        reason: of a failure, in words.
        spread: standard deviation of the rate over the steps that count, as a share of it.
    """

    status: Status
    rate: float = 0.0
    reason: str = ""
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class Trial:
    """A layout that was tried.

    Attributes:
        number: from 0, in the order in which they began.
        layout: in words.
        choices: see `features`.
        outcome: how it went.
        hint: what the cost model had said; None where it was not asked.
    """

    number: int
    layout: str
    choices: dict[str, Any]
    outcome: Outcome
    hint: Hint | None = None

    @property
    def ran(self) -> bool:
        """Whether it did not fail."""
        return self.outcome.status == "ok"
