"""Answers of a wanted length, in tokens."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from resilin.posttrain.verifiers.verifier import Answer, Verifier, VerifierError


def _tokens(label: Any) -> float:
    try:
        wanted = float(label)
    except (TypeError, ValueError):
        wanted = math.nan
    if not (math.isfinite(wanted) and wanted >= 0):
        raise VerifierError(f"a length is a number of tokens, not {label!r:.60}")
    return wanted


class NearLength(Verifier):
    """1 at the label's number of tokens, falling by 1 over `scale` tokens on both sides, never below 0."""

    scale: Annotated[float, Field(gt=0)] = 8192.0
    """Tokens of difference at which the score is 0."""

    def score(self, answer: Answer) -> float:
        """In [0, 1]."""
        return max(0.0, 1.0 - abs(len(answer.token_ids) - _tokens(answer.label)) / self.scale)

    def check_label(self, label: Any) -> None:
        """The label is a number of tokens."""
        _tokens(label)


class UpToLength(NearLength):
    """1 up to the label's number of tokens, then falling as in `NearLength`."""

    def score(self, answer: Answer) -> float:
        """In [0, 1]."""
        return max(0.0, 1.0 - max(0.0, len(answer.token_ids) - _tokens(answer.label)) / self.scale)
