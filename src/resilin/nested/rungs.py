"""What all records of a model's sizes have alike, whatever the method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.budgets import Budget

Rung = tuple[str, Budget]
"""A size by name."""
Kind = Literal["trained", "mix", "untrained"]


class SizeRecord(ABC):
    """The sizes of a model, as far as they are known."""

    __slots__ = ()

    @abstractmethod
    def rungs(self, settings: DecoderSettings) -> list[Rung]:
        """Sizes with names, ascending; the last is the whole model."""

    def rungs_per_size(self, settings: DecoderSettings) -> int:
        """How many rungs it is from one size to the next, those between being mixtures; 1: none is a mixture."""
        return 1

    @abstractmethod
    def kind(self, settings: DecoderSettings, wanted: Budget) -> Kind:
        """Whether a budget was trained, mixes what was, or neither.

        Raises:
            BudgetError: it does not fit the model.
        """
