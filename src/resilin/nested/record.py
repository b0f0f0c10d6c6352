"""Which sizes a model was made for: beside its weights as `nested.json`, or in the settings of its run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resilin.models.decoder_settings import DecoderSettings
from resilin.models.weight_files import read_json, write_atomically
from resilin.nested.budgets import Budget, BudgetError
from resilin.nested.granularities import Granularity, Target, budget_at, check_granularities
from resilin.nested.mix_n_match import ladder
from resilin.nested.objective import Nested
from resilin.nested.rungs import Kind, SizeRecord
from resilin.nested.sub_model import sub_model

FILE = "nested.json"


@dataclass(frozen=True, slots=True)
class NestRecord(SizeRecord):
    """The sizes of a nested model.

    Attributes:
        granularities: ascending; the last is the whole model.
        targets: what they cut.
        trained: whether the model was trained at them; else it was only put in order, or nobody knows.
        ordering: how its neurons and heads were put in order: "activation", "weight", or None.
        each_layer: whether layers were trained at sizes of their own, so that mixtures were trained too.
    """

    granularities: tuple[Granularity, ...]
    targets: tuple[Target, ...] = ("ffn",)
    trained: bool = False
    ordering: str | None = None
    each_layer: bool = False

    def __post_init__(self) -> None:
        check_granularities(self.granularities)

    @classmethod
    def of(cls, settings: Nested) -> NestRecord:
        """Of a model that was trained so."""
        return cls(settings.granularities, settings.targets, trained=True, each_layer=settings.mode == "per-layer")

    def write(self, folder: Path) -> Path:
        """Put it beside the weights."""
        write_atomically(folder / FILE, json.dumps(asdict(self), indent=2) + "\n")
        return folder / FILE

    @classmethod
    def read(cls, folder: Path) -> NestRecord | None:
        """What stands beside the weights; None where nothing does.

        Raises:
            BudgetError: the file holds something else.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        tree: dict[str, Any] = read_json(file)
        try:
            granularities, targets = (tuple(tree.pop(name)) for name in ("granularities", "targets"))
            return cls(granularities, targets, **tree)
        except (KeyError, TypeError, ValueError) as error:
            raise BudgetError(f"{file}: is no record of a nested model: {error}; remove it, or make it anew") from None

    def rungs(self, settings: DecoderSettings) -> list[tuple[str, Budget]]:
        """The trained sizes and all mixtures of neighbouring ones, by rising size, with names."""
        return ladder(settings, self.granularities, self.targets)

    def rungs_per_size(self, settings: DecoderSettings) -> int:
        """How many rungs there are from one trained size to the next."""
        return settings.layers

    def kind(self, settings: DecoderSettings, wanted: Budget) -> Kind:
        """Whether a budget is one of the trained sizes, mixes them by layer, or was never trained.

        Raises:
            BudgetError: it does not fit the model.
        """
        part = sub_model(settings, wanted)
        members = [sub_model(settings, budget_at(settings, one, self.targets)) for one in self.granularities]
        if not self.trained:
            return "trained" if part == members[-1] else "untrained"
        if part in members:
            return "trained"
        mixes = part.hidden == members[-1].hidden and len(part.layers) == settings.layers
        mixes = mixes and all(any(one in member.layers for member in members) for one in part.layers)
        if not mixes:
            return "untrained"
        return "trained" if self.each_layer else "mix"
