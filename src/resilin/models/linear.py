"""Linear maps and embeddings whose weights are left for `initial.py` or a loader to fill."""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """`nn.Linear` that draws nothing when made: initial weights are keyed by parameter name."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws nothing when made."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""
