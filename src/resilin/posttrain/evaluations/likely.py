"""Multiple choice by likelihood: the model's answer is the choice it finds most probable."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from resilin.data.chat import encode_chat
from resilin.data.row_files import Row, read_rows
from resilin.evaluate.multiple_choice import Answer, answer_questions, joined
from resilin.evaluate.questions import Question, QuestionError, parse_question
from resilin.posttrain.evaluations.evaluation import (
    Evaluation,
    Job,
    Outcome,
    Progress,
    Subject,
    SuiteError,
    digest_of,
    group_of,
    grouped_mean,
    spread_of_mean,
)

Picked = Literal["acc", "acc_norm", "acc_bytes", "mc2"]


class LikelyChoice(Evaluation):
    """Questions of which the likelihoods of the choices decide (the columns are those of `--choices`)."""

    rows: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files of questions (.jsonl, .parquet, .arrow), folders or patterns."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Only the first so many."""
    picked: Picked = "acc"
    """The choice with the largest log-likelihood, the largest per character, per byte; or `mc2`: the share of the
    probability that the right choices have."""
    template: str | None = None
    """The context from a row's columns, such as "Q: {question}\\nA:"."""
    examples: tuple[str, ...] = ()
    """Files of worked examples: the first `shots` questions of them, always in this order."""
    separator: str = "\n\n"
    """Between examples."""
    chat: bool = False
    """Put the context into a user's message and the choice into the assistant's."""
    group_by: str | None = None
    """A column: the score is then the mean over its values' means, such as over subjects."""

    @model_validator(mode="after")
    def _settings_agree(self) -> LikelyChoice:
        if self.shots and not self.examples:
            raise ValueError(f"shots = {self.shots} needs examples: name a file of worked examples")
        return self

    def _question(self, row: Row) -> Question:
        try:
            return parse_question(row.value, self.template)
        except QuestionError as error:
            raise row.error(str(error)) from None

    def _examples(self) -> list[Question]:
        shown = [self._question(row) for row in islice(read_rows(self.examples), self.shots)] if self.shots else []
        if len(shown) < self.shots:
            raise SuiteError(
                f"{self.name}: shots = {self.shots}, but {', '.join(self.examples)} hold only {len(shown)}"
            )
        return shown

    def prepare(self, subject: Subject) -> Job:
        """Read the questions, each behind the worked examples."""
        shown = self._examples()
        before = [("".join(joined(q.context, q.choices[q.gold])), q.context) for q in shown]
        questions: list[Question] = []
        groups: list[str] = []
        for row in islice(read_rows(self.rows), self.limit):
            question = self._question(row)
            if any(question.context == context for _, context in before):
                raise SuiteError(f"{self.name}: {row.where} is also a worked example: its answer is shown")
            context = self.separator.join([*(text for text, _ in before), question.context])
            questions.append(Question(context, question.choices, question.gold, question.also))
            if self.group_by is not None:
                groups.append(group_of(row.value, self.group_by, row.where))
        if not questions:
            raise SuiteError(f"{self.name}: {', '.join(self.rows)} hold no rows")

        def in_chat(question: Question, choice: str) -> tuple[list[int], list[int]]:
            asked = [{"role": "user", "content": question.context}]
            ids = encode_chat(subject.tokenizer, asked, add_generation_prompt=True).ids
            return ids, subject.tokenizer.encode(choice)

        if self.chat:
            in_chat(questions[0], questions[0].choices[0])  # a template that does not fit is told at once

        def run(folder: Path, progress: Progress) -> Outcome:
            found = answer_questions(
                subject.model,
                subject.tokenizer,
                questions,
                encode=in_chat if self.chat else None,
                batch_tokens=subject.batch_tokens,
                progress=progress,
            )
            values = [_value(self.picked, answer, q.golds) for answer, q in zip(found.answers, questions, strict=True)]
            total, by_group = grouped_mean(values, groups if self.group_by is not None else None)
            spread = spread_of_mean(values)
            facts: dict[str, Any] = {
                "rows": len(questions),
                "standard_error": None if spread is None else 100 * spread,
                "chance": 100 * found.chance,
                "choices_with_cut_context": found.truncated,
                "also": {name: 100 * getattr(found, name) for name in ("acc", "acc_norm", "acc_bytes", "mc2")},
            }
            return Outcome(total, {**facts, "groups": by_group} if by_group else facts)

        return Job(digest_of(self, *map(repr, questions)), run)


def _value(picked: Picked, answer: Answer, golds: Sequence[int]) -> float:
    if picked == "mc2":
        return answer.share
    choice = {"acc": answer.picked, "acc_norm": answer.picked_norm, "acc_bytes": answer.picked_bytes}[picked]
    return float(choice in golds)
