"""Which sizes a run has trained: whatever its method, a list of budgets."""

from __future__ import annotations

from pathlib import Path

from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.chain_objective import chain_losses_in
from resilin.nested.chain_record import ChainRecord
from resilin.nested.chosen_record import ChosenRecord
from resilin.nested.elastic_pretraining import elastic_in
from resilin.nested.elastic_record import ElasticRecord
from resilin.nested.loop_record import LoopRecord
from resilin.nested.objective import nested_in
from resilin.nested.record import NestRecord
from resilin.nested.rungs import SizeRecord
from resilin.nested.shortcut import shortcut_in


def trained_sizes(settings: DecoderSettings, objective: object = None, folder: Path | None = None) -> SizeRecord | None:
    """What is known of a model's sizes; None where nothing tells that it was trained at several.

    Args:
        settings: of the full model.
        objective: the settings of what it learned; None: unknown.
        folder: of its run, where sizes that are learned are written down; None: there is none.

    Raises:
        BudgetError: what is written there cannot be read.
    """
    if settings.loop is not None:
        shortcut = shortcut_in(objective)
        return LoopRecord() if shortcut is None else LoopRecord.of(shortcut)
    if settings.chains is not None:
        losses = chain_losses_in(objective)
        return ChainRecord() if losses is None else ChainRecord.of(losses, len(settings.chains.sizes))
    if (elastic := elastic_in(objective)) is not None:
        return ElasticRecord.of(elastic)
    if (nested := nested_in(objective)) is not None:
        return NestRecord.of(nested)
    return None if folder is None else ChosenRecord.read(folder)
