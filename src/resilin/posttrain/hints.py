"""Hints that fade: hard prompts begin with a part of a reference thought, less of it as training goes on.

At step t the first p of the thought's tokens stand behind the prompt, with

    p = share * exp(-decay * t * pass rate)

(AHRL, ERNIE 5.0, section 5). The pass rate is pass@k of the model before reinforcement learning, by prompt: what it can
do loses its hint soon, what it never does keeps it. Hints are part of the prompt: nothing is learnt from their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from resilin.config import Settings
from resilin.data.errors import DataError
from resilin.data.tokenizer import Tokenizer


class Hints(Settings):
    """Where thoughts are, and how they fade."""

    share: float = Field(default=0.5, ge=0, le=1)
    """p at the first step: the part of a thought's tokens that is shown."""
    decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    """gamma, per step and pass rate."""
    thought: str = "thought"
    """The rows' column with the reference thought; rows without one get no hint."""
    pass_rate: str = "pass_rate"
    """The rows' column with pass@k of the first model (`resilin.posttrain.evaluations.written.pass_at`), from 0 to 1;
    rows with a thought need it."""

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """Refuse a row whose hint could not be made.

        Raises:
            DataError: its thought is no text, or its pass rate no number from 0 to 1.
        """
        thought, rate = row.get(self.thought), row.get(self.pass_rate)
        if thought is None:
            return
        if not isinstance(thought, str):
            raise DataError(f"{where}: {self.thought} should be a text, not {thought!r:.60}")
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate <= 1:
            raise DataError(
                f"{where}: a row with a {self.thought} needs {self.pass_rate}, pass@k of the first model between 0 and "
                f"1; it is {rate!r:.60}"
            )

    def part(self, row: Mapping[str, Any], step: int) -> float:
        """P of a row at a step; 0 where it has no thought."""
        if row.get(self.thought) is None:
            return 0.0
        return self.share * math.exp(-self.decay * step * float(row[self.pass_rate]))

    def tokens(self, row: Mapping[str, Any], step: int, tokenizer: Tokenizer) -> list[int]:
        """The tokens that stand behind the prompt."""
        part = self.part(row, step)
        if not part:
            return []
        ids = tokenizer.encode(row[self.thought])
        return ids[: math.floor(part * len(ids) + 1e-9)]
