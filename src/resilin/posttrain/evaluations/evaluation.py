"""One line of a suite: what it tells of, and how it is measured."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from resilin.config import Settings
from resilin.config.component import use_path
from resilin.config.errors import UserError
from resilin.data.tokenizer import Tokenizer
from resilin.models.decoder import Decoder

Part = Literal["dev", "unseen"]


class SuiteError(UserError):
    """Results that do not fit the suite, rows that cannot be used, or a second look at what may be seen once."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that is evaluated.

    Attributes:
        name: for the report.
        model: the decoder.
        tokenizer: of the model.
        end_ids: tokens that end a text.
        weights: a digest of them.
        batch_rows: texts that are written side by side.
        batch_tokens: positions computed at a time where texts are only scored, padding counted.
    """

    name: str
    model: Decoder
    tokenizer: Tokenizer
    end_ids: frozenset[int]
    weights: str
    batch_rows: int = 32
    batch_tokens: int = 4096


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an evaluation found.

    Attributes:
        score: from 0 to 100; of one of several tasks, theirs by name.
        facts: what else there is to know, for the report's file: counts, errors, further scores. The same model on the
            same rows gives the same facts.
    """

    score: float | dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)


Progress = Callable[[float], None]
"""Told the share that is done, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Job:
    """An evaluation whose rows are read and checked, ready to run.

    Attributes:
        digest: changes with anything that decides the outcome, except the model.
        run: computes it; the folder keeps what is done, so that a killed job goes on.
    """

    digest: str
    run: Callable[[Path, Progress], Outcome]


class Evaluation(Settings):
    """One line of a suite. This class only describes one whose results are brought from elsewhere."""

    name: str
    """What results call it."""
    skill: str
    """What it tells of."""
    part: Part = "dev"
    """`dev` steers the work; `unseen` is looked at once."""
    shots: Annotated[int, Field(ge=0)] = 0
    """Worked examples in the prompt."""
    chain_of_thought: bool = False
    """Whether the model reasons before it answers."""
    metric: str = "accuracy"
    """What is counted, in words."""
    tasks: tuple[str, ...] = ()
    """Where it is the mean of several: their names."""

    def prepare(self, subject: Subject) -> Job:
        """Read and check everything that is needed, so that a wrong file stops before hours of work.

        Raises:
            UserError: with file and line, for what cannot be used.
        """
        raise SuiteError(
            f"{self.name}: only describes an evaluation: name with `use` how it is run, such as "
            "resilin.posttrain.evaluations.written:WrittenAnswers, and give its rows"
        )


def digest_of(evaluation: Evaluation, *parts: str) -> str:
    """A hash of an evaluation's settings and of further texts that decide its outcome."""
    settings = json.dumps([use_path(type(evaluation)), evaluation.model_dump(mode="json")], sort_keys=True)
    digest = hashlib.sha256(settings.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.encode(errors="surrogatepass"))
    return digest.hexdigest()


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return math.fsum(values) / len(values)


def spread_of_mean(values: Sequence[float]) -> float | None:
    """Standard error of the mean of values taken as a sample; None for fewer than two."""
    if len(values) < 2:
        return None
    middle = mean(values)
    variance = math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def grouped_mean(values: Sequence[float], groups: Sequence[str] | None) -> tuple[float, dict[str, float]]:
    """The mean of values in percent, or of the means of their groups, and these by name."""
    if groups is None:
        return 100.0 * mean(values), {}
    members: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    means = {group: 100.0 * mean(mine) for group, mine in sorted(members.items())}
    return mean(list(means.values())), means


def group_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The group a row belongs to.

    Raises:
        SuiteError: the row has no such column.
    """
    if row.get(column) is None:
        raise SuiteError(f"{where}: no column {column!r} to group by; columns here: {', '.join(sorted(row)) or 'none'}")
    return str(row[column])


def file_name(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9+]+", "-", name).strip("-").lower() or "evaluation"
