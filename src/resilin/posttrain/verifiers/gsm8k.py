"""Grade-school mathematics: the last number of the answer is the answer."""

from __future__ import annotations

import re
from typing import Any

from resilin.posttrain.verifiers.verifier import Answer, Verifier, VerifierError

_COMMA = re.compile(r"(\d),(\d)")
_NUMBER = re.compile(r"[-+]?(?:\d*\.\d+|\d+)")


def last_number(text: str) -> str:
    """The last number of a text as it is written, without commas between digits; the whole text where there is none."""
    plain = _COMMA.sub(r"\1\2", text)
    found = _NUMBER.findall(plain)
    return found[-1] if found else plain


class Gsm8k(Verifier):
    """1 if the last number is written like the label, else 0 (Tülu 3, Lambert et al. 2024, section 6.1).

    Strings are compared, not values: "3.50" is not "3.5", "12.0" not "12", and in "10-3" the last number is "-3". A
    text that ends with the right number by chance is right.
    """

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        return float(last_number(answer.text).lower() == str(answer.label).lower())

    def claimed(self, text: str) -> str | None:
        """The last number."""
        found = last_number(text)
        return found if _NUMBER.fullmatch(found) else None

    def check_label(self, label: Any) -> None:
        """The label is a number or a text."""
        if not isinstance(label, str | int | float) or isinstance(label, bool):
            raise VerifierError(f"gsm8k compares with a number as text, such as '42', not {label!r:.60}")
