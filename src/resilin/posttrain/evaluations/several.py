"""The mean of several evaluations, as one line of a suite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from resilin.config import component
from resilin.posttrain.evaluations.evaluation import (
    Evaluation,
    Job,
    Outcome,
    Progress,
    Subject,
    SuiteError,
    digest_of,
    mean,
)

AnyEvaluation = Annotated[Evaluation, component("resilin.posttrain.evaluations.written:WrittenAnswers")]
"""A line of a suite: a table whose `use` says how it is run; left out, written answers and a verifier."""


class MeanOfTasks(Evaluation):
    """Several evaluations that count as one; each is run and reported by its name."""

    of: Annotated[tuple[AnyEvaluation, ...], Field(min_length=1)]
    """The evaluations; skill and part are those of the whole."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_whole(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("of"), list | tuple):
            return given
        same = {key: given[key] for key in ("skill", "part") if key in given}
        parts = [{**same, **one} if isinstance(one, dict) else one for one in given["of"]]
        names = [one.get("name") if isinstance(one, dict) else one.name for one in parts]
        return {"tasks": tuple(str(name) for name in names), **given, "of": parts}

    @model_validator(mode="after")
    def _names_agree(self) -> MeanOfTasks:
        names = tuple(one.name for one in self.of)
        if self.tasks != names or len(set(names)) < len(names):
            raise ValueError(f"tasks should be the different names of what it is the mean of: {', '.join(names)}")
        return self

    def prepare(self, subject: Subject) -> Job:
        """All of them."""
        jobs = {one.name: one.prepare(subject) for one in self.of}

        def run(folder: Path, progress: Progress) -> Outcome:
            scores: dict[str, float] = {}
            facts: dict[str, Any] = {}
            for number, (name, job) in enumerate(jobs.items()):

                def part(share: float, number: int = number) -> None:
                    progress((number + share) / len(jobs))

                found = job.run(folder, part)
                if isinstance(found.score, dict):
                    raise SuiteError(f"{self.name}: {name} is itself the mean of several: list those here")
                scores[name] = found.score
                facts[name] = {"score": found.score, **found.facts}
            errors = [one.get("standard_error") for one in facts.values()]
            spread = None if None in errors else math.hypot(*errors) / len(errors)
            return Outcome(scores, {"mean": mean(list(scores.values())), "standard_error": spread, "tasks": facts})

        return Job(digest_of(self, *(job.digest for job in jobs.values())), run)
