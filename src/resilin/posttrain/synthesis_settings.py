"""Which tasks a teacher is to invent for personas, and how each kind is asked for, answered and checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from resilin.config import Settings
from resilin.data.errors import DataError
from resilin.data.row_files import read_rows
from resilin.data.row_template import columns_of
from resilin.posttrain.constraints import CONSTRAINTS, Constraint
from resilin.posttrain.filters import AnswerFilters


class SynthesisTask(Settings):
    """One kind of task: how it is asked for, answered and checked."""

    name: str
    """The rows' `source`."""
    prompt: str
    """Asks the teacher for a task: {persona} is put in, and {constraint} where there are some."""
    starts_with: str = ""
    """What the task is to begin with, such as "Problem:"; it is taken away, and texts without it are left out."""
    answer: str = "{task}"
    """Asks for the answer; {task} is put in. What is learnt from is the task alone."""
    system: str | None = None
    """The system message of both rounds."""
    per_persona: Annotated[int, Field(ge=1)] = 1
    """Tasks asked for each persona."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of the tasks."""
    answer_temperature: Annotated[float, Field(ge=0)] = 0.7
    """Of the answers."""
    max_task_tokens: Annotated[int, Field(ge=1)] = 512
    """Of a task."""
    max_tokens: Annotated[int, Field(ge=1)] = 2048
    """Of an answer."""
    min_task_words: Annotated[int, Field(ge=1)] = 4
    """A task of fewer words is left out."""
    verifier: Literal["gsm8k", "math", "strict_math"] | None = None
    """Rows get this `dataset`, and as `ground_truth` what most answers claim."""
    votes: Annotated[int, Field(ge=1)] = 1
    """Answers to each task, which vote for the truth."""
    agreement: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the votes that the truth needs."""
    constrained: bool = False
    """Each task gets a constraint on the form of its answer; rows get `dataset` ifeval and the check as truth."""
    constraints: Annotated[tuple[Constraint, ...], Field(min_length=1)] = CONSTRAINTS
    """Which; each task gets one, drawn by persona."""
    filters: AnswerFilters = AnswerFilters()
    """Which answers are kept."""

    @model_validator(mode="after")
    def _fits(self) -> SynthesisTask:
        asked, solved = columns_of(self.prompt), columns_of(self.answer)
        if "persona" not in asked:
            raise ValueError("prompt should hold {persona}: without it every persona brings the same task")
        wrong = sorted({*asked} - {"persona", "constraint"}) + sorted({*solved} - {"task"})
        if wrong or "task" not in solved:
            raise ValueError(f"prompt knows {{persona}} and {{constraint}}, answer needs {{task}}; not: {wrong}")
        if "constraint" in asked and not self.constrained:
            raise ValueError("prompt asks for a {constraint}: set constrained = true")
        if self.constrained and self.verifier is not None:
            raise ValueError(f"constrained rows are checked by ifeval: leave out verifier = {self.verifier!r}")
        if self.votes > 1 and self.verifier is None:
            raise ValueError(f"votes = {self.votes}: answers vote for the truth that a verifier checks: name one")
        if self.votes > 1 and self.answer_temperature == 0:
            raise ValueError(f"votes = {self.votes} at answer_temperature 0 would all be one answer: raise it")
        if self.per_persona > 1 and self.temperature == 0:
            raise ValueError(f"per_persona = {self.per_persona} at temperature 0 would give one task several times")
        return self


class Synthesis(Settings):
    """The kinds of task, and the draws."""

    tasks: Annotated[tuple[SynthesisTask, ...], Field(min_length=1)]
    """Each is asked for every persona."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the constraints that are drawn."""

    @model_validator(mode="after")
    def _names_differ(self) -> Synthesis:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks should have different names: {', '.join(names)}")
        return self


def read_personas(paths: Sequence[str]) -> list[str]:
    """Personas from rows with a column `persona`, or from the lines of .txt files; each once, in order.

    Raises:
        DataError: a row without one, or no persona at all.
    """
    found: dict[str, None] = {}
    for path in paths:
        if path.endswith(".txt"):
            try:
                lines = Path(path).read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from None
            except UnicodeDecodeError:
                raise DataError(f"{path}: is not UTF-8") from None
            found |= dict.fromkeys(line.strip() for line in lines if line.strip())
            continue
        for row in read_rows([path]):
            persona = row.value.get("persona")
            if not isinstance(persona, str) or not persona.strip():
                raise row.error(
                    f"no text in the column persona; columns here: {', '.join(sorted(row.value)) or 'none'}"
                )
            found[persona.strip()] = None
    if not found:
        raise DataError(f"{', '.join(paths)}: no personas")
    return list(found)
