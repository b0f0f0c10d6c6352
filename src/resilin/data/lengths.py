"""Rows whose length changes as a run goes on: short texts first, then long ones.

[source]
use = "resilin.data.lengths:Lengths"
phases = [{ steps = 600, sequence_length = 512 }, { sequence_length = 2048, batch_size = 4 }]
[source.source]
use = "resilin.data.text_source:TextSource"
paths = ["data/text"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, model_validator

from resilin.config import Settings, component
from resilin.data.settings import SourceContext, SourceSettings
from resilin.keys import hash64
from resilin.nouns import Batch, Source, State

PositiveInt = Annotated[int, Field(gt=0)]


class LengthPhase(Settings):
    """A part of the run whose rows have one length."""

    steps: PositiveInt | None = None
    """How many steps it lasts; only the last phase leaves it out, and lasts to the end."""
    sequence_length: PositiveInt
    """Tokens of a row."""
    batch_size: PositiveInt | None = None
    """Rows of a step; left out: the run's."""


class Lengths(SourceSettings):
    """One source, read with rows of several lengths one after another; held-out data with those of the last phase."""

    source: Annotated[SourceSettings, component("resilin.data.text_source:TextSource")]
    """What is read; it has a `sequence_length`."""
    phases: Annotated[tuple[LengthPhase, ...], Field(min_length=1)]
    """In order."""

    @model_validator(mode="after")
    def _check(self) -> Lengths:
        if not hasattr(self.source, "sequence_length"):
            raise ValueError(f"source is a {type(self.source).__name__}, which has no sequence_length to change")
        endless = [number for number, phase in enumerate(self.phases) if phase.steps is None]
        if endless != [len(self.phases) - 1]:
            raise ValueError("steps of a phase: give them for each phase but the last, which lasts to the run's end")
        return self

    def build(self, context: SourceContext) -> Source:
        """The source of one split."""

        def part(number: int, phase: LengthPhase) -> Source:
            own = replace(
                context,
                seed=context.seed if not number else hash64(context.seed, "lengths", number) >> 1,
                batch_size=phase.batch_size or context.batch_size,
            )
            return self.source.model_copy(update={"sequence_length": phase.sequence_length}).build(own)

        if context.split != "train":
            return part(0, self.phases[-1].model_copy(update={"batch_size": None}))
        starts = [0]
        for phase in self.phases[:-1]:
            assert phase.steps is not None
            starts.append(starts[-1] + phase.steps)
        return LengthsSource([part(number, phase) for number, phase in enumerate(self.phases)], starts)


class LengthsSource:
    """The source of `Lengths`.

    Args:
        parts: of each phase.
        starts: the first step of each.
    """

    def __init__(self, parts: Sequence[Source], starts: Sequence[int]) -> None:
        self.parts, self.starts = tuple(parts), tuple(starts)

    def _at(self, step: int) -> tuple[Source, int]:
        number = max(number for number, start in enumerate(self.starts) if start <= step)
        return self.parts[number], step - self.starts[number]

    def slots(self, step: int) -> int:
        """How many rows step `step` has."""
        part, own = self._at(step)
        return part.slots(own)

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """These rows."""
        part, own = self._at(step)
        return part.fetch(own, slots)

    def state_dict(self) -> State:
        """That of each phase."""
        return {str(number): part.state_dict() for number, part in enumerate(self.parts)}

    def load_state_dict(self, state: State) -> None:
        """Take it back.

        Raises:
            ValueError: it is of other phases.
        """
        if set(state) != {str(number) for number in range(len(self.parts))}:
            raise ValueError(
                f"the checkpoint's source has {len(state)} phases, and the settings {len(self.parts)}: resume with the "
                "settings the run was started with"
            )
        for number, part in enumerate(self.parts):
            part.load_state_dict(state[str(number)])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("parts", "starts"):
            raise AttributeError(name)
        return getattr(self.parts[-1], name)

    def __bool__(self) -> bool:
        return True
