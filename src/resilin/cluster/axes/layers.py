"""What a plan knows of the model and of the machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from resilin.cluster.axes.clocks import Clocks
from resilin.parallel.pipeline import Split, Time


class PlanError(ValueError):
    """What was given to be planned contradicts itself, or cannot be."""


@dataclass(frozen=True, slots=True)
class Layers:
    """What each layer of the model costs, for one micro-batch as the run has them.

    Attributes:
        seconds: (L,) forward and backward together, measured; of any unit, as long as it is one.
        embedding: seconds of what comes before the first layer.
        head: seconds of what comes after the last: norm, head and loss.
        forward: the forward's share of these.
        weights: (L,) bytes of a layer's weights; whoever has the layer keeps them, and as much of gradients.
        states: (L,) bytes of what is divided among a stage's replicas: master weights and moments.
        activations: (L,) bytes that one micro-batch leaves behind until its backward.
    """

    seconds: tuple[Time, ...]
    embedding: Time = 0
    head: Time = 0
    forward: Time = Fraction(1, 3)
    weights: tuple[float, ...] = ()
    states: tuple[float, ...] = ()
    activations: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.seconds)
        for name in ("weights", "states", "activations"):
            given = getattr(self, name)
            if given and len(given) != count:
                raise PlanError(f"{name} are given for {len(given)} layers, seconds for {count}")
            if any(value < 0 for value in given):
                raise PlanError(f"{name} of a layer cannot be negative")
        if not count or any(value < 0 for value in (*self.seconds, self.embedding, self.head)):
            raise PlanError("a plan needs the seconds of at least one layer, none of them negative")
        if not 0 <= self.forward <= 1:
            raise PlanError(f"the forward's share of the time is between 0 and 1, not {self.forward}")

    def of_stages(self, split: Split) -> tuple[Time, ...]:
        """(P,) seconds of one micro-batch at each stage."""
        return split.costs(self.seconds, self.embedding, self.head)

    def held(self, first: int, end: int, replicas: int, micros: Time) -> float:
        """Bytes at a member with layers `first:end`.

        Args:
            first: of its layers.
            end: one past the last.
            replicas: of its stage, among which states are divided.
            micros: activations that it holds at once, in micro-batches.
        """
        weights, states, activations = (
            sum(given[first:end]) for given in (self.weights, self.states, self.activations)
        )
        return 2 * weights + states / replicas + float(micros) * activations


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan knows of the members' hardware.

    Attributes:
        memory: bytes of one member; None: enough.
        bandwidth: bytes a second that one member sends, and receives, besides; None: layers move in no time.
        setup: seconds that any move of layers takes besides.
        transfer: seconds of a message between two stages.
        clocks: that can be set; None: none.
    """

    memory: float | None = None
    bandwidth: float | None = None
    setup: float = 0.0
    transfer: Time = 0
    clocks: Clocks | None = None

    def __post_init__(self) -> None:
        if min(self.memory or 0, self.bandwidth or 0, self.setup, self.transfer) < 0 or self.bandwidth == 0:
            raise PlanError(
                "bytes of memory, bytes a second and seconds of a machine cannot be negative, nor 0 a second"
            )


def numbers(values: Sequence[Time]) -> list[float]:
    """For JSON."""
    return [float(value) for value in values]
