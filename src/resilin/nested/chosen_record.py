"""What is known of the sizes that a router has chosen (Nemotron Elastic): written in its run's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.budgets import Budget, BudgetError
from resilin.nested.elastic import FILE
from resilin.nested.rungs import Kind, Rung, SizeRecord
from resilin.nested.sub_model import sub_model


@dataclass(frozen=True, slots=True)
class ChosenRecord(SizeRecord):
    """The sub-models of an elastic model.

    Attributes:
        sizes: the target of each, a share of the whole's cost, and its budget; ascending.
    """

    sizes: tuple[tuple[float, Budget], ...]

    @classmethod
    def read(cls, folder: Path) -> ChosenRecord | None:
        """Of a run's folder; None where nothing has been chosen yet.

        Raises:
            BudgetError: the file says something else.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            targets = json.loads(path.read_text(encoding="utf-8"))["targets"]
            sizes = {float(share): Budget.from_dict(told["budget"]) for share, told in targets.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BudgetError(f"{path}: expected sizes of each target, as the run writes them; {error!r}") from None
        return cls(tuple(sorted(sizes.items(), key=lambda one: one[0])))

    def rungs(self, settings: DecoderSettings) -> list[Rung]:
        """Every sub-model, ascending, named by its target; the last is the whole."""
        return [(f"{share:g}", wanted) for share, wanted in self.sizes]

    def kind(self, settings: DecoderSettings, wanted: Budget) -> Kind:
        """Whether a sub-model was trained.

        Raises:
            BudgetError: the budget does not fit the model.
        """
        part = sub_model(settings, wanted)
        trained = part in [sub_model(settings, one) for _, one in self.sizes]
        return "trained" if trained else "untrained"
