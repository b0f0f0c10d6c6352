"""A scripted judge of answers to sums: marks, and a verifier that asks which of two answers it likes better."""

from __future__ import annotations

import json
from typing import Any

from resilin.posttrain.verifiers.verifier import Answer, Verifier, VerifierError

STYLES = {"num": "{}", "box": "[{}]", "word": "sum {}"}
"""What an order asks for, and the form of an answer that follows it."""
FILLER = "hm "
_KEYS = frozenset({"number", "style", "rival"})


def judged(text: str, style: str, number: int) -> float:
    """The mean of marks from 1 to 5: being right (counts twice), following the order, and length.

    Two or more fillers before the answer are the best length: the longer of two answers wins, all else equal.
    """
    bare = text
    while bare.startswith(FILLER):
        bare = bare[len(FILLER) :]
    fillers = (len(text) - len(bare)) // len(FILLER)
    digits = "".join(c for c in bare if c.isdigit())
    right = 5.0 if digits == str(number) else 1.0
    form = 5.0 if digits and bare == STYLES[style].format(digits) else 1.0
    return (2 * right + form + min(1.0 + 2.0 * fillers, 5.0)) / 4


def contest(number: int, style: str, rival: str) -> str:
    """The `ground_truth` of a row whose answers `Beats` compares with another one."""
    return json.dumps({"number": number, "style": style, "rival": rival})


class Beats(Verifier):
    """1 where the judge likes the answer better than the one in the row, 1/2 where both have the same mark, else 0."""

    def score(self, answer: Answer) -> float:
        """0, 1/2 or 1."""
        row = _read(answer.label)
        mine, other = (judged(text, row["style"], row["number"]) for text in (answer.text, row["rival"]))
        return 0.5 if mine == other else float(mine > other)

    def check_label(self, label: Any) -> None:
        """The label was written by `contest`."""
        _read(label)


def _read(label: Any) -> dict[str, Any]:
    try:
        row = json.loads(label)
    except (TypeError, json.JSONDecodeError):
        row = None
    if not isinstance(row, dict) or set(row) != _KEYS or row["style"] not in STYLES:
        raise VerifierError(f"a contest has a number, a style and a rival, as JSON text; found {label!r:.60}")
    return row
