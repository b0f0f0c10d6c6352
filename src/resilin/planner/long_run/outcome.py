"""What became of a run: every second accounted for, what it cost, what it used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run under one way to go on.

    Times are seconds; `useful + slower + again + saving + stopped + standing == seconds`.

    Attributes:
        finished: whether all steps were done; else the figures are of the time until it was given up.
        seconds: from the start to the end.
        steps: done, and kept.
        useful: that these take when nobody is missing.
        slower: more than that, because fewer or slower machines computed.
        again: for what was computed, lost and had to be computed again (or, in a run given up, was lost).
        saving: for checkpoints.
        stopped: for noticing losses, joining, restarting.
        standing: too few machines were there.
        losses: times at which machines were lost.
        restarts: of these, when the run began again from a checkpoint.
        events: of the trace until the end, machines that came back counted as well.
        machine_seconds: during which machines were there, spare ones too.
        busy_seconds: of machines that computed at the usual clock, so much that it takes the same energy.
    """

    finished: bool
    seconds: float
    steps: float
    useful: float
    slower: float
    again: float
    saving: float
    stopped: float
    standing: float
    losses: int
    restarts: int
    events: int
    machine_seconds: float
    busy_seconds: float

    @property
    def goodput(self) -> float:
        """Useful time over all of it."""
        return self.useful / self.seconds


@dataclass(frozen=True, slots=True)
class Bill:
    """What a machine costs.

    Attributes:
        price: of a machine for an hour.
        watts: of a machine that computes, at the usual clock.
        idle: of one that is there and does not.
        always: whether machines are paid for while they are not there (owned or reserved ones).
    """

    price: float = 0.0
    watts: float = 0.0
    idle: float = 0.0
    always: bool = True

    def cost(self, outcome: Outcome, machines: int) -> float:
        """In the price's currency.

        Args:
            outcome: of the run.
            machines: of the cluster, spare ones too.
        """
        seconds = outcome.seconds * machines if self.always else outcome.machine_seconds
        return self.price * seconds / 3600

    def energy(self, outcome: Outcome) -> float:
        """In kWh."""
        joules = self.idle * outcome.machine_seconds + (self.watts - self.idle) * outcome.busy_seconds
        return joules / 3.6e6
