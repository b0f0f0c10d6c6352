"""Answers that are, or hold, one of some texts."""

from __future__ import annotations

import json
from typing import Any

from resilin.posttrain.verifiers.verifier import Answer, Verifier, VerifierError, without_thinking

_AROUND = " \t\r\n.,;:!?\"'`*()[]{}"


def wanted_texts(label: Any, name: str) -> list[str]:
    """A label as the texts of which any is right: a text or number, a list of them, or such a list as JSON text.

    Raises:
        VerifierError: it is none of these, or an empty list.
    """
    if isinstance(label, str) and label.lstrip().startswith("["):
        try:
            parsed = json.loads(label)
        except json.JSONDecodeError:
            parsed = label
        label = parsed if isinstance(parsed, list) else label
    labels = label if isinstance(label, list) else [label]
    if not labels or any(not isinstance(item, str | int | float) or isinstance(item, bool) for item in labels):
        raise VerifierError(f"{name} compares with a text, or a list of texts of which any is right, not {label!r:.60}")
    return [str(item) for item in labels]


def bare(text: str) -> str:
    """A text in lower case, with single spaces, without the punctuation and brackets around it."""
    return " ".join(text.casefold().strip(_AROUND).split())


class Exact(Verifier):
    """1 if the answer (without its thoughts) is the label or one of several, whatever the case and what is around."""

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        said = bare(without_thinking(answer.text))
        return float(any(said == bare(text) for text in wanted_texts(answer.label, "exact")))

    def check_label(self, label: Any) -> None:
        """The label is a text or a list of texts."""
        wanted_texts(label, "exact")


class Contains(Verifier):
    """1 if the label, or one of several, occurs in the answer (without its thoughts), in any case (as PopQA counts)."""

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        said = without_thinking(answer.text).casefold()
        return float(any(text.casefold() in said for text in wanted_texts(answer.label, "contains")))

    def check_label(self, label: Any) -> None:
        """The label is a text or a list of texts, none of them empty (which every answer holds)."""
        if not all(text.strip() for text in wanted_texts(label, "contains")):
            raise VerifierError("contains looks for a text that is not empty; the label holds an empty one")
