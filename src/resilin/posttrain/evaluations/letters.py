"""Multiple choice that the model answers in writing, with a letter: reasoning first where that is wanted."""

from __future__ import annotations

import string
from typing import Literal

from resilin.data.errors import DataError
from resilin.data.row_files import Row
from resilin.data.row_template import fill
from resilin.evaluate.questions import QuestionError, parse_question
from resilin.posttrain.evaluations.items import Item
from resilin.posttrain.evaluations.written import AnyVerifier, WrittenAnswers
from resilin.posttrain.verifiers.exact import Exact

_ASK = "{question}\n\n{choices}\n\n"
_THINK = "Think step by step. Then finish with the words: The answer is (X), with the letter of the right choice for X."
_ANSWER = "Answer with the letter of the right choice, such as (A)."
_PATTERNS = (
    r"(?i:answer\s+is)\W{0,4}([A-Z])\b",
    r"(?i:answer)\s*[:=]\W{0,4}([A-Z])\b",
    r"\(([A-Z])\)",
    r"^\W*([A-Z])\b",
)


class LetterAnswers(WrittenAnswers):
    """Questions with choices (in the columns `resilin evaluate --choices` reads), answered by a letter.

    `{choices}` in the prompt is the list of choices, each behind its letter in brackets; `{question}` is the row's
    question, or what else it has as context.
    """

    prompt: str | None = None
    """Left out: question, choices, and a line that asks for the letter (after thoughts with `chain_of_thought`)."""
    verifier: AnyVerifier = Exact()
    """Compares letters."""
    answer_patterns: tuple[str, ...] = _PATTERNS
    """Where the letter stands: "the answer is (B)", "Answer: B", the last letter in brackets, or the first word."""
    unmatched: Literal["whole", "wrong"] = "wrong"
    """An answer without a letter scores 0."""

    def item(self, row: Row, example: bool = False) -> Item:
        """A question as it is asked; the label is the letter, or the letters of which any is right."""
        try:
            question = parse_question(row.value)
        except QuestionError as error:
            raise row.error(str(error)) from None
        letters = string.ascii_uppercase
        if len(question.choices) > len(letters):
            raise row.error(f"{len(question.choices)} choices; there are letters for {len(letters)}")
        own = row.value.get("question")
        columns = {
            **row.value,
            "question": own if isinstance(own, str) else question.context,
            "choices": "\n".join(f"({letters[n]}) {text}" for n, text in enumerate(question.choices)),
        }
        template = self.prompt if self.prompt is not None else _ASK + (_THINK if self.chain_of_thought else _ANSWER)
        right = [letters[index] for index in question.golds]
        try:
            prompt = fill(template, columns)
            answer = (
                f"The answer is ({right[0]})." if self.example_answer is None else fill(self.example_answer, columns)
            )
        except DataError as error:
            raise row.error(str(error)) from None
        return Item(
            prompt, prompt, right[0] if len(right) == 1 else right, answer if example else "", row.value, row.where
        )
