"""A suite of evaluations on a model: prepared first, then run one after the other, each kept when it is done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resilin.posttrain.evaluations.evaluation import Job, Outcome, Part, Progress, Subject, SuiteError, file_name
from resilin.posttrain.suite import Report, Suite

Watch = Callable[[str], Progress]
"""Told the name of each evaluation as it begins; returns who is told of its progress."""


def run_suite(suite: Suite, subject: Subject, part: Part, folder: Path, watch: Watch) -> Report:
    """Measure a model on one part of a suite.

    Everything is read and checked before anything is computed. What is done is kept in the folder, so that the same
    call goes on where an earlier one ended; the unseen part is measured once for all models of a piece of work.

    Args:
        suite: the evaluations.
        subject: the model.
        part: which part.
        folder: of the piece of work: what several models are compared in.
        watch: for progress.

    Raises:
        UserError: rows that cannot be used, or a second look at the unseen part.
    """
    if part == "unseen" and (seen := suite.looked_at(folder, subject.name, subject.weights)) is not None:
        return seen
    lines = suite.of(part)
    if not lines:
        raise SuiteError(f"the suite has no {part} evaluations")
    jobs = {line.name: line.prepare(subject) for line in lines}
    mine = folder / f"{file_name(subject.name)}-{subject.weights[:8]}"
    outcomes = {name: _kept(name, job, mine, watch) for name, job in jobs.items()}
    known: dict[str, Any] = {
        "weights": subject.weights,
        "measured": {name: job.digest[:16] for name, job in jobs.items()},
        "facts": {name: outcome.facts for name, outcome in outcomes.items()},
    }
    results = {name: outcome.score for name, outcome in outcomes.items()}
    if part == "unseen":
        return suite.look(folder, subject.name, results, **known)
    return suite.report(subject.name, results, part, **known)


def _kept(name: str, job: Job, folder: Path, watch: Watch) -> Outcome:
    """The outcome of a job, from the folder where it was run before."""
    file = folder / f"{file_name(name)}-{job.digest[:12]}.outcome.json"
    if file.is_file():
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            return Outcome(value["score"], value["facts"])
        except (ValueError, KeyError, TypeError):
            file.unlink()
    outcome = job.run(folder, watch(name))
    folder.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps({"score": outcome.score, "facts": outcome.facts}, indent=1), encoding="utf-8")
    aside.replace(file)
    # As it is read back, so that the report does not depend on when the job was run.
    value = json.loads(file.read_text(encoding="utf-8"))
    return Outcome(value["score"], value["facts"])
