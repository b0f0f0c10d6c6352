"""What is known of the scales that a decoder of chains was trained at: told by the settings of its run."""

from __future__ import annotations

from dataclasses import dataclass

from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.budgets import Budget
from resilin.nested.chain_objective import ChainLosses
from resilin.nested.rungs import Kind, Rung, SizeRecord
from resilin.nested.sub_model import sub_model


@dataclass(frozen=True, slots=True)
class ChainRecord(SizeRecord):
    """The scales of a decoder of chains.

    Attributes:
        trained: of each scale, whether it was trained by a loss of its own; (): the full one alone.
    """

    trained: tuple[bool, ...] = ()

    @classmethod
    def of(cls, settings: ChainLosses, chains: int) -> ChainRecord:
        """Of a model that was trained so."""
        if settings.loss == "last":
            return cls()
        return cls(tuple(weight > 0 for weight in settings.weights or (1.0,) * chains))

    def rungs(self, settings: DecoderSettings) -> list[Rung]:
        """Every scale, ascending, with names; the last is the whole model."""
        assert settings.chains is not None
        count = len(settings.chains.sizes)
        return [(_name(chains), Budget(chains=chains)) for chains in range(1, count)] + [(_name(count), Budget())]

    def kind(self, settings: DecoderSettings, wanted: Budget) -> Kind:
        """Whether a scale was trained.

        Raises:
            BudgetError: the budget does not fit the model.
        """
        part = sub_model(settings, wanted)
        for number, (_, rung) in enumerate(self.rungs(settings)):
            if part == sub_model(settings, rung):
                whole = rung == Budget()
                return "trained" if whole or (number < len(self.trained) and self.trained[number]) else "untrained"
        return "untrained"


def _name(chains: int) -> str:
    return f"{chains} chain" if chains == 1 else f"{chains} chains"
