"""Multiple-choice questions from a JSON Lines file, in the field names the usual benchmark files have.

A line is an object with a context, its choices and the right one:

    {"query": "The sky on a clear day is", "choices": ["blue", "green"], "gold": 0}
    {"question": "Which is a mammal?", "choices": {"text": ["bat", "wren"], "label": ["A", "B"]}, "answerKey": "A"}
    {"ctx": "A man sits at a piano. He", "endings": ["starts to play.", "eats it."], "label": "0"}
    {"goal": "Open a jar", "sol1": "twist the lid", "sol2": "paint the lid", "label": 0}
    {"question": "Is glass a liquid?", "mc2_targets": {"choices": ["No.", "It is solid.", "Yes."], "labels": [1, 1, 0]}}
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilin.config.errors import UserError
from resilin.data.errors import DataError
from resilin.data.row_template import fill

CONTEXT_FIELDS = ("context", "ctx", "query", "prompt", "input", "goal")
CHOICE_FIELDS = ("choices", "endings", "options", "answers", "mc2_targets", "mc1_targets")
GOLD_FIELDS = ("gold", "gold_index", "answer_index", "answerKey", "answer", "label", "target")


class QuestionError(UserError):
    """A question that cannot be read; the text names file and line."""


@dataclass(frozen=True, slots=True)
class Question:
    """A context, the texts that may follow it, and which of them is right.

    Attributes:
        context: what the model is given.
        choices: at least two texts, without the space that divides them from the context.
        gold: index of the right choice; of several, of the first.
        also: indices of the further right ones.
    """

    context: str
    choices: tuple[str, ...]
    gold: int
    also: tuple[int, ...] = ()

    @property
    def golds(self) -> tuple[int, ...]:
        """Indices of all right choices."""
        return (self.gold, *self.also)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _first(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any] | None:
    return next(((name, row[name]) for name in names if row.get(name) is not None), None)


def _context(row: Mapping[str, Any], template: str | None) -> str:
    if template is not None:
        try:
            return fill(template, row)
        except DataError as error:
            raise QuestionError(str(error)) from None
    found, question = _first(row, CONTEXT_FIELDS), row.get("question")
    if question is not None:
        if not isinstance(question, str):
            raise QuestionError(f"'question' should be a text, not {json.dumps(question)[:60]}")
        head = f"{found[1]}\n" if found is not None else ""
        return f"{head}Question: {question}\nAnswer:"
    if found is None:
        raise QuestionError(f"no context: expected one of the fields {_quoted((*CONTEXT_FIELDS, 'question'))}")
    name, context = found
    if not isinstance(context, str):
        raise QuestionError(f"{name!r} should be a text, not {json.dumps(context)[:60]}")
    return context


def _choices(row: Mapping[str, Any]) -> tuple[list[str], list[str] | None]:
    """The texts, and their labels where the file has some."""
    labels = None
    found = _first(row, CHOICE_FIELDS)
    if found is None and "sol1" in row:
        numbered = sorted(key for key in row if key.startswith("sol") and key[3:].isdigit())
        found = ("sol1, sol2", [row[key] for key in numbered])
    if found is None:
        raise QuestionError(f"no choices: expected a list in one of the fields {_quoted(CHOICE_FIELDS)}")
    name, texts = found
    if isinstance(texts, dict):
        labels = texts.get("label", texts.get("labels"))
        texts = texts.get("text", texts.get("choices"))
        if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
            raise QuestionError(f"{name!r} is an object: it should hold 'text' and 'label', lists of equal length")
        labels = [str(label) for label in labels]
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise QuestionError(f"{name!r} should be a list of non-empty texts")
    if len(texts) < 2:
        raise QuestionError(f"{name!r} has {len(texts)} choice(s); a question needs at least two")
    return texts, labels


def _golds(row: Mapping[str, Any], texts: list[str], labels: list[str] | None) -> list[int]:
    found = _first(row, GOLD_FIELDS)
    if found is None and labels is not None and "1" in labels and {*labels} <= {"0", "1"}:
        return [index for index, label in enumerate(labels) if label == "1"]
    if found is None:
        raise QuestionError(f"no right answer: expected one of the fields {_quoted(GOLD_FIELDS)}")
    name, gold = found
    index = None
    if isinstance(gold, int) and not isinstance(gold, bool):
        index = gold
    elif isinstance(gold, str):
        if labels is not None and gold in labels:
            index = labels.index(gold)
        elif gold in texts:
            index = texts.index(gold)
        elif len(gold) == 1 and gold in string.ascii_uppercase:
            index = string.ascii_uppercase.index(gold)
        elif gold.isascii() and gold.isdigit():
            index = int(gold)
    if index is None:
        raise QuestionError(
            f"{name!r} is {json.dumps(gold)[:60]}: expected an index from 0, a letter from A, a label of a choice, "
            "or the text of one"
        )
    if not 0 <= index < len(texts):
        raise QuestionError(f"{name!r} is {json.dumps(gold)}, but there are {len(texts)} choices, counted from 0")
    return [index]


def parse_question(row: object, template: str | None = None) -> Question:
    """One line's object as a question.

    Args:
        row: the decoded JSON value.
        template: context with the line's fields in braces, such as "Q: {question}\\nA:". None: the context field as
            it is, or "Question: ...\\nAnswer:" (after the context, if both are there) where there is a `question`.

    Raises:
        QuestionError: what is missing or wrong, and what was expected.
    """
    if not isinstance(row, dict):
        raise QuestionError("the line should be a JSON object")
    texts, labels = _choices(row)
    gold, *also = _golds(row, texts, labels)
    return Question(_context(row, template), tuple(texts), gold, tuple(also))


def read_questions(path: Path, template: str | None = None) -> list[Question]:
    """All questions of a JSON Lines file (blank lines are passed over).

    Raises:
        QuestionError: naming file and line.
        OSError: the file cannot be read.
    """
    questions = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    questions.append(parse_question(json.loads(line), template))
            except UnicodeDecodeError as error:
                raise QuestionError(f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8") from None
            except json.JSONDecodeError as error:
                raise QuestionError(f"{path}:{number}: not JSON: {error.msg} at character {error.pos + 1}") from None
            except QuestionError as error:
                raise QuestionError(f"{path}:{number}: {error}") from None
    if not questions:
        raise QuestionError(f"{path}: holds no questions; expected one JSON object on each line")
    return questions
