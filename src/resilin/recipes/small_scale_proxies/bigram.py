"""The bigram model that section 3.3 holds transplanted logits against, counted on the runs' own training text."""

from __future__ import annotations

from resilin.config import parse_settings
from resilin.data.settings import SourceContext
from resilin.evaluate.bigram import Bigram
from resilin.recipes.findings import RunRecord
from resilin.run.settings import RunSettings

_BATCH = 1024
"""Rows read at once while counting."""


def bigram_loss(record: RunRecord) -> float:
    """Nats per token of a bigram model on the held-out batches that the run was evaluated on.

    It is counted on one pass over the whole training split, of which a short run sees only a part.

    Raises:
        DataError: the run's data are not there any more.
    """
    settings = parse_settings(RunSettings, record.settings, "settings of a recorded run")
    once = settings.source.model_copy(update={"epochs": 1})
    text = once.build(SourceContext(settings.seed, "train", _BATCH))
    held_out = settings.source.build(SourceContext(settings.seed, "validation", settings.train.batch_size))
    vocab_size: int = text.vocab_size  # type: ignore[attr-defined]
    return Bigram.count(text, vocab_size).loss(held_out, settings.evaluation.batches or None)
