"""What a verifier is: settings that can be asked for the score of an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from resilin.config import Settings
from resilin.config.errors import UserError


class VerifierError(UserError):
    """A label or a row that no answer can be checked against; the text says what was expected."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to be checked.

    Attributes:
        token_ids: of the answer.
        text: its text, without special tokens.
        label: what it is compared with: the row's `ground_truth`.
        query: the prompt as plain text.
    """

    token_ids: Sequence[int]
    text: str
    label: Any
    query: str = ""


class Verifier(Settings, ABC):
    """Says how right an answer is, from 0 to 1. A verifier of one's own is a subclass, named by `use`."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Multiplies its scores in the reward."""

    @abstractmethod
    def score(self, answer: Answer) -> float:
        """How right the answer is, in [0, 1].

        Raises:
            VerifierError: the label is of no use to this verifier.
        """

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """The scores of several answers; a verifier that asks somebody else asks for all at once."""
        return [self.score(answer) for answer in answers]

    def check_label(self, label: Any) -> None:
        """Refuse a label that no answer can be checked against, before anything is generated.

        Raises:
            VerifierError: saying what was expected.
        """

    def claimed(self, text: str) -> str | None:
        """The label by which an answer would be right, by which answers can vote; None where it names none."""
        return None

    def __call__(self, token_ids: Sequence[int], text: str, label: Any, query: str = "") -> float:
        """The score of one answer, in [0, 1]."""
        return self.score(Answer(token_ids, text, label, query))


def without_thinking(text: str) -> str:
    """What an answer says after its thoughts: behind the last `</think>`, without `<answer>` tags."""
    said = text.replace("<|assistant|>", "").strip().split("</think>")[-1]
    return said.replace("<answer>", "").replace("</answer>", "").strip()
