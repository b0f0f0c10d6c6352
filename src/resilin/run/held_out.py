"""Held-out data to evaluate a model on: that of its own run, or a folder of token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from resilin.config.errors import UserError
from resilin.data.packed import PackedSource, Shards
from resilin.data.settings import SourceContext
from resilin.data.tokenizer import Tokenizer
from resilin.models.decoder import Decoder
from resilin.nouns import Source
from resilin.run.folder import RunFolder


class HeldOutError(UserError):
    """Data that a model cannot be evaluated on; the text says why."""


def held_out_source(folder: RunFolder) -> Source:
    """The validation split of a run, in the batches it was evaluated on while training."""
    settings = folder.settings()
    context = SourceContext(settings.seed, "validation", settings.train.batch_size)
    source: Source = settings.source.build(context)
    if not hasattr(source, "__len__"):
        raise HeldOutError(f"{folder.path}: its source has no fixed validation split; name --text, --data or --choices")
    return source


def shard_source(
    path: Path,
    model: Decoder,
    tokenizer: Tokenizer | None,
    window: int | None,
    batch_tokens: int,
    split: Literal["all", "validation"],
) -> PackedSource:
    """Token shards in rows of `window` tokens, each token a label once.

    Raises:
        HeldOutError: the shards were made with another tokenizer, or hold ids the model does not have.
    """
    most = model.settings.max_positions
    length = most if window is None else window
    if length > most:
        raise HeldOutError(f"the window ({length}) is more than the {most} positions of the model")
    chosen = {"fraction": 0.0} if split == "all" else {}
    settings = Shards.model_validate(
        {"path": path, "sequence_length": length, "shuffle": False, "epochs": 1, "held_out": chosen}
    )
    context = SourceContext(0, "train" if split == "all" else "validation", max(1, batch_tokens // length))
    source = settings.build(context)
    if source.vocab_size > model.settings.vocab_size:
        raise HeldOutError(
            f"{path}: its vocabulary has {source.vocab_size} tokens, the model knows {model.settings.vocab_size}"
        )
    theirs = source.tokenizer
    if tokenizer is not None and theirs is not None and theirs.digest != tokenizer.digest:
        raise HeldOutError(
            f"{path}: was tokenised with another tokenizer than the model's: tokenise it again with the model's own"
        )
    return source
