"""A pipeline as a plan sees it: which layers each stage has, and who computes which slots of a step there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from resilin.cluster.axes.layers import PlanError
from resilin.cluster.view import View
from resilin.parallel.pipeline import SlotTable, Split, in_blocks


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages, their layers and their members' work.

    Attributes:
        split: which layers each stage has.
        tables: for each stage, which slots each member computes, by its number.
        micro: slots of a micro-batch as the run deals them.
        ticks: micro-batches that each replica ran when none was missing.
    """

    split: Split
    tables: tuple[SlotTable, ...]
    micro: int
    ticks: int

    def __post_init__(self) -> None:
        if len(self.tables) != self.split.stages:
            raise PlanError(f"{len(self.tables)} slot tables are given for {self.split.stages} stages")
        if len({table.slots for table in self.tables}) > 1:
            raise PlanError(f"stages have tables of different steps: {[table.slots for table in self.tables]} slots")
        if min(self.micro, self.ticks) < 1:
            raise PlanError("a micro-batch needs a slot at least, and a replica a micro-batch")

    @classmethod
    def of(cls, split: Split, members: Sequence[Sequence[int]], micros: int, micro: int) -> Pipeline:
        """Every stage's micro-batches in contiguous blocks.

        Args:
            split: which layers each stage has.
            members: of each stage.
            micros: of a step.
            micro: slots of each.

        Raises:
            PlanError: a stage has nobody, or more members than there are micro-batches.
        """
        counts = [len(stage) for stage in members]
        if not counts or min(counts) < 1 or max(counts) > micros or micro < 1:
            raise PlanError(f"stages need a member each, and no more than the {micros} micro-batches: {counts}")
        tables = tuple(in_blocks(micros * micro, len(stage), micro).named(stage) for stage in members)
        return cls(split, tables, micro, -(-micros // max(counts)))

    @classmethod
    def of_view(cls, view: View, layers: int, micros: int, micro: int) -> Pipeline:
        """The pipeline of a view in which nobody is missing.

        Args:
            view: of the run.
            layers: of the model; a view that divides nothing does not say.
            micros: of a step.
            micro: slots of each.

        Raises:
            PlanError: as `of` does.
        """
        bounds = view.layers or (0, layers)
        return cls.of(Split(tuple(bounds)), [stage.members for stage in view.stages], micros, micro)

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Of each stage."""
        return tuple(table.replicas for table in self.tables)

    @property
    def slots(self) -> int:
        """Of a step."""
        return self.tables[0].slots

    def loads(self) -> tuple[Fraction, ...]:
        """(P,) by how much each stage's busiest member has more slots than when none was missing (1: nothing more)."""
        whole = self.ticks * self.micro
        return tuple(Fraction(max(table.load(one) for one in table.replicas), whole) for table in self.tables)
