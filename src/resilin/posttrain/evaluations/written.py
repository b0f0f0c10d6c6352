"""Written answers that a verifier checks: accuracy, partial credit, or pass@k."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from resilin.config import component
from resilin.config.settings import closest
from resilin.data.row_template import columns_of, fill
from resilin.posttrain.evaluations.answers import Written
from resilin.posttrain.evaluations.evaluation import Outcome, group_of, grouped_mean, spread_of_mean
from resilin.posttrain.evaluations.items import Item, one_group
from resilin.posttrain.evaluations.writing import Writing
from resilin.posttrain.verifiers.table import KNOWN
from resilin.posttrain.verifiers.verifier import Answer, Verifier


def _known(value: Any) -> Any:
    """A verifier's short name as the table that names its class."""
    if not isinstance(value, str):
        return value
    if value.lower() not in KNOWN:
        near = closest(value, KNOWN)
        hint = f"did you mean {near!r}?" if near else f"there are: {', '.join(KNOWN)}"
        raise ValueError(f"no verifier is called {value!r}; {hint} (or a table with `use`)")
    return {"use": KNOWN[value.lower()]}


AnyVerifier = Annotated[Verifier, component(KNOWN["gsm8k"]), BeforeValidator(_known)]
"""A verifier by its short name ("gsm8k"), or a table with `use` and its settings."""


def pass_at(k: int, answers: int, right: int) -> float:
    """The chance that of k answers drawn from these at least one is right: 1 - C(n - c, k) / C(n, k).

    Args:
        k: how many are drawn; at most `answers`.
        answers: n.
        right: c.

    Source: Chen et al. 2021, equation 1.
    """
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


class WrittenAnswers(Writing):
    """The model's answers, checked by a verifier."""

    verifier: AnyVerifier
    """Says how right an answer is: a known one by its name, or a table with `use`."""
    also: dict[str, AnyVerifier] = Field(default_factory=dict)
    """Further verifiers of the same answers, for the report's facts."""
    answer_patterns: tuple[str, ...] = ()
    """Regular expressions with one group: of the first that occurs, the last occurrence is the answer."""
    unmatched: Literal["whole", "wrong"] = "whole"
    """An answer in which no pattern occurs is checked as a whole, or scores 0."""
    checked: str = "{answer}"
    """What the verifier sees: the answer and the row's columns in braces, such as "{prompt}{answer}" for code."""
    pass_at: Annotated[int, Field(ge=1)] | None = None
    """Score the chance that one of so many answers is right (pass@k); left out, the mean over answers."""
    group_by: str | None = None
    """A column: the score is then the mean over its values' means, such as over subjects."""

    @model_validator(mode="after")
    def _checks_agree(self) -> WrittenAnswers:
        if self.pass_at is not None and self.pass_at > self.samples:
            raise ValueError(f"pass_at = {self.pass_at} needs at least as many samples, not {self.samples}")
        for pattern in self.answer_patterns:
            one_group(pattern)
        if "answer" not in columns_of(self.checked):
            raise ValueError(f"checked = {self.checked!r} should hold {{answer}}")
        return self

    def check(self, item: Item) -> None:
        """The verifiers can use the label, and the row has the columns that are asked for."""
        for verifier in (self.verifier, *self.also.values()):
            verifier.check_label(item.label)
        self._seen("", item)
        if self.group_by is not None:
            group_of(item.row, self.group_by, item.where)

    def answer_in(self, text: str) -> str | None:
        """What of a text is the answer: by the patterns; None where they find none and the whole does not count."""
        for pattern in self.answer_patterns:
            found = list(re.finditer(pattern, text, re.DOTALL))
            if found:
                return (found[-1].group(1) or "").strip()
        return text if not self.answer_patterns or self.unmatched == "whole" else None

    def _seen(self, text: str, item: Item) -> str:
        return text if self.checked == "{answer}" else fill(self.checked, {**item.row, "answer": text})

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[Written]]) -> Outcome:
        """The mean over items of each one's mean, or of its pass@k."""
        groups = None if self.group_by is None else [group_of(i.row, self.group_by, i.where) for i in items]
        values = self._values(self.verifier, items, answers)
        total, by_group = grouped_mean(values, groups)
        facts: dict[str, Any] = {"unmatched_answers": self._unmatched(answers)} if self.answer_patterns else {}
        spread = spread_of_mean(values)
        facts["standard_error"] = None if spread is None else 100 * spread
        if by_group:
            facts["groups"] = by_group
        if self.also:
            further = {name: self._values(verifier, items, answers) for name, verifier in self.also.items()}
            facts["also"] = {name: grouped_mean(mine, groups)[0] for name, mine in further.items()}
        return Outcome(total, facts)

    def _unmatched(self, answers: Sequence[Sequence[Written]]) -> int:
        return sum(
            not any(re.search(pattern, one.text, re.DOTALL) for pattern in self.answer_patterns)
            for mine in answers
            for one in mine
        )

    def _values(self, verifier: Verifier, items: Sequence[Item], answers: Sequence[Sequence[Written]]) -> list[float]:
        """Of each item, in [0, 1]."""
        asked: list[Answer] = []
        places: list[tuple[int, int]] = []
        scores = [[0.0] * len(mine) for mine in answers]
        for number, (item, mine) in enumerate(zip(items, answers, strict=True)):
            for sample, one in enumerate(mine):
                found = self.answer_in(one.text)
                if found is not None:
                    asked.append(Answer(one.tokens, self._seen(found, item), item.label, item.query))
                    places.append((number, sample))
        for (number, sample), score in zip(places, verifier.scores(asked), strict=True):
            scores[number][sample] = score
        if self.pass_at is None:
            return [math.fsum(mine) / len(mine) for mine in scores]
        return [pass_at(self.pass_at, len(mine), sum(score >= 1.0 for score in mine)) for mine in scores]
