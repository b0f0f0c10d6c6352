"""Reading comprehension with numbers: DROP's F1 (Dua et al. 2019, section 5)."""

from __future__ import annotations

import re
import string
from typing import Any

from resilin.posttrain.verifiers.verifier import Answer, Verifier, VerifierError, without_thinking

_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _number(token: str) -> str | None:
    try:
        return str(float(token))
    except ValueError:
        return None


def bag_of_words(text: str) -> frozenset[str]:
    """The different words: lower case, divided at spaces and hyphens, without articles and punctuation; numbers as
    their values ("5" and "5.0" are one word).
    """
    words = set()
    for token in re.split(r"[ \-]", text.lower()):
        number = _number(token)
        plain = number if number is not None else token.translate(_PUNCTUATION)
        if number is None:
            plain = _number(plain) or plain
        words |= {part for part in plain.split() if part not in _ARTICLES}
    return frozenset(words)


def _f1(said: frozenset[str], wanted: frozenset[str]) -> float:
    numbers = {word for word in wanted if _number(word) is not None}
    if numbers and not numbers & said:
        return 0.0  # a wrong number makes the rest worthless
    common = len(said & wanted)
    precision = common / len(said) if said else 1.0
    recall = common / len(wanted) if wanted else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def drop_f1(text: str, spans: list[str]) -> float:
    """How well one written span fits an answer of one or several, in [0, 1].

    The written text is held against the span it fits best; further spans count as missing.
    """
    said = bag_of_words(text)
    return max(_f1(said, bag_of_words(span)) for span in spans) / len(spans)


def _alternatives(label: Any) -> list[list[str]]:
    alternatives = label if isinstance(label, list) else [label]
    read = [[str(s) for s in one] if isinstance(one, list | tuple) else [str(one)] for one in alternatives]
    flat = [s for one in alternatives for s in (one if isinstance(one, list | tuple) else [one])]
    if not read or not all(read) or any(not isinstance(s, str | int | float) or isinstance(s, bool) for s in flat):
        raise VerifierError(
            f"drop_f1 compares with a text, several of which any is right, or lists of spans, not {label!r:.60}"
        )
    return read


class DropF1(Verifier):
    """DROP's F1 of the answer's different words (without its thoughts); 0 where the label's numbers are missing.

    The label is a text, a list of texts of which any is right, or a list of lists: of alternatives, each of spans.
    """

    def score(self, answer: Answer) -> float:
        """In [0, 1]; the best alternative's."""
        said = without_thinking(answer.text)
        return max(drop_f1(said, spans) for spans in _alternatives(answer.label))

    def check_label(self, label: Any) -> None:
        """The label is one of the three forms."""
        _alternatives(label)
