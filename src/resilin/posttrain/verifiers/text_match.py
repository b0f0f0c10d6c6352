"""Answers that are compared with a text."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

from resilin.posttrain.verifiers.verifier import Answer, Verifier, VerifierError, without_thinking

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain_words(text: str) -> str:
    """A text in lower case without punctuation, articles and further white space (as SQuAD compares answers)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def word_f1(text: str, label: str) -> float:
    """Harmonic mean of precision and recall of the words, as bags, after `plain_words`; in [0, 1]."""
    said, wanted = plain_words(text).split(), plain_words(label).split()
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _text(label: Any, name: str) -> str:
    if not isinstance(label, str | int | float):
        raise VerifierError(f"{name} compares with a text, not {label!r:.60}")
    return str(label)


class Flan(Verifier):
    """1 if what follows the last "The answer is: " has the words of the label."""

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        said = answer.text.split("The answer is: ")[-1].strip()
        return float(plain_words(said) == plain_words(_text(answer.label, "flan")))

    def check_label(self, label: Any) -> None:
        """The label is a text."""
        _text(label, "flan")


class TaggedAnswer(Verifier):
    """1 if what stands in the last <answer> ... </answer> has the words of the label; 0 without both tags."""

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        if "<answer>" not in answer.text or "</answer>" not in answer.text:
            return 0.0
        said = answer.text.split("<answer>")[-1].split("</answer>")[0]
        return float(plain_words(said) == plain_words(_text(answer.label, "string_matcher")))

    def check_label(self, label: Any) -> None:
        """The label is a text."""
        _text(label, "string_matcher")


class StringF1(Verifier):
    """How many words the answer (without its thoughts) and the label share: `word_f1`, the best of several labels."""

    def score(self, answer: Answer) -> float:
        """In [0, 1]."""
        labels = answer.label if isinstance(answer.label, list) else [answer.label]
        said = without_thinking(answer.text)
        return max(word_f1(said, _text(label, "string_f1")) for label in labels)

    def check_label(self, label: Any) -> None:
        """The label is a text or a list of texts."""
        if isinstance(label, list) and not label:
            raise VerifierError("string_f1 compares with at least one text; the list is empty")
        for item in label if isinstance(label, list) else [label]:
            _text(item, "string_f1")
