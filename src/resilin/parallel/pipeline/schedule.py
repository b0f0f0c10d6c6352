"""What each pipeline rank does, in order: actions, and the schedule they make."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from resilin.parallel.pipeline.errors import ScheduleError


class Kind(StrEnum):
    """What is computed for one micro-batch at one stage.

    A backward pass is either whole (B), or cut in two (Qi et al. 2023, arXiv 2401.10241): I gives the gradient of the
    stage's input, which the stage before waits for; W gives the gradients of its weights, which nobody waits for.
    """

    F = "F"
    B = "B"
    I = "I"  # noqa: E741 - torch's letter for it
    W = "W"


F, B, I, W = Kind.F, Kind.B, Kind.I, Kind.W  # noqa: E741


@dataclass(frozen=True, slots=True)
class Action:
    """One computation.

    Attributes:
        kind: forward, backward, or one half of a backward.
        stage: of the model, counted from the embedding.
        micro: the micro-batch.
    """

    kind: Kind
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.micro}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """From torch's form: stage, kind, micro-batch, such as `2F0`.

        Raises:
            ScheduleError: when it does not read so.
        """
        match = _ACTION.fullmatch(text.strip())
        if match is None:
            raise ScheduleError(
                f"{text.strip()!r} is no action: write stage, kind (F, B, I or W) and micro-batch, such as 2F0"
            )
        return cls(Kind(match[2]), int(match[1]), int(match[3]))


_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")


@dataclass(frozen=True, slots=True)
class Schedule:
    """The order in which each pipeline rank computes, for one batch.

    Only the order is fixed: when an action runs follows from its rank's earlier ones and from what it waits for. A
    schedule is not checked when it is made; `validate` does that.

    Attributes:
        actions: for each rank, its actions in order.
        rank_of: for each stage, the rank that holds it.
        micros: how many micro-batches.
        name: of the way it was made.
    """

    actions: tuple[tuple[Action, ...], ...]
    rank_of: tuple[int, ...]
    micros: int
    name: str = "custom"

    @property
    def ranks(self) -> int:
        """How many pipeline ranks."""
        return len(self.actions)

    @property
    def stages(self) -> int:
        """How many stages."""
        return len(self.rank_of)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages a rank holds, ascending."""
        return tuple(stage for stage, owner in enumerate(self.rank_of) if owner == rank)

    def text(self) -> str:
        """One line for each rank, its actions separated by commas: what torch reads as a compute-only CSV file."""
        return "\n".join(",".join(map(str, row)) for row in self.actions) + "\n"

    @classmethod
    def parse(cls, text: str, name: str = "custom") -> Schedule:
        """From `text()`, or from a CSV file of one's own; empty cells, which show bubbles, are skipped.

        A stage belongs to the rank whose line names it first; the micro-batches are as many as the largest number
        says. `validate` finds whatever is missing then.

        Raises:
            ScheduleError: naming the line and the cell that is no action.
        """
        rows = []
        owners: dict[int, int] = {}
        for rank, line in enumerate(text.strip().splitlines()):
            row = []
            for column, cell in enumerate(line.split(",")):
                if not cell.strip():
                    continue
                try:
                    action = Action.parse(cell)
                except ScheduleError as error:
                    raise ScheduleError(f"line {rank + 1}, cell {column + 1}: {error}") from None
                row.append(action)
                owners.setdefault(action.stage, rank)
            rows.append(tuple(row))
        if not owners:
            raise ScheduleError("the schedule is empty: write one line for each rank, such as 0F0,0F1,0B0,0B1")
        for stage in range(max(owners)):
            if stage not in owners:
                raise ScheduleError(f"stage {stage} is on no line, though stage {max(owners)} is")
        micros = 1 + max(action.micro for row in rows for action in row)
        return cls(tuple(rows), tuple(owners[stage] for stage in range(len(owners))), micros, name)


def loop(stages: int, ranks: int) -> tuple[int, ...]:
    """The rank of each stage when stages are dealt round: stage `s` lives on rank `s % ranks`."""
    _check_stages(stages, ranks)
    return tuple(stage % ranks for stage in range(stages))


def vee(stages: int, ranks: int) -> tuple[int, ...]:
    """The rank of each stage when every second round runs backwards, so that the last rank holds neighbours.

    With two stages for each rank the first rank holds the embedding and the head: `(r, 2 * ranks - 1 - r)`.
    """
    _check_stages(stages, ranks)
    return tuple(s % ranks if s // ranks % 2 == 0 else ranks - 1 - s % ranks for s in range(stages))


def _check_stages(stages: int, ranks: int) -> None:
    if ranks < 1 or stages < 1:
        raise ScheduleError(f"a pipeline needs at least one rank and one stage, not {ranks} and {stages}")
    if stages % ranks:
        raise ScheduleError(
            f"{stages} stages cannot be shared evenly by {ranks} ranks: use {stages - stages % ranks or ranks} "
            f"or {stages + ranks - stages % ranks} stages"
        )
