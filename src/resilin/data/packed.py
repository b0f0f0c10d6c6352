"""The source of language models: rows of a token stream, by slot.

Legend: B slots, T inputs of a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from resilin.data.errors import DataError
from resilin.data.order import BatchSizes, SampleOrder
from resilin.data.ordered import OrderedSource
from resilin.data.pool import check_samples
from resilin.data.rows import LongDocuments, Packing, Rows, make_rows
from resilin.data.settings import SourceContext, SourceSettings, Split
from resilin.data.shards import TokenShards
from resilin.data.split import HeldOut, split_stream
from resilin.data.stream import TokenStream
from resilin.data.tokenizer import Tokenizer
from resilin.keys import hash64
from resilin.nouns import Batch

IGNORED = -100


class PackedSettings(SourceSettings):
    """What every source over token shards has in common."""

    sequence_length: Annotated[int, Field(ge=1)] = 256
    """Inputs of a row (T)."""
    packing: Packing = "stream"
    """`stream` cuts the text anywhere and pads nothing; `documents` packs whole neighbours; `pad` gives each
    document a row of its own."""
    separate_documents: bool = False
    """Add `positions` restarting with each document and `documents`, so that attention stays inside a document."""
    long_documents: LongDocuments = "error"
    """What becomes of a document longer than a row, where documents are not cut."""
    shuffle: bool = True
    """Read the rows in a new random order each epoch (those held out in one fixed random order); False: in order."""
    epochs: Annotated[int, Field(ge=1)] | None = None
    """Passes over the data, after which the source ends; left out, it goes on for ever."""
    unique_tokens: Annotated[int, Field(ge=1)] | None = None
    """Train on a random subset of rows of about this many tokens only, again in every epoch."""
    held_out: HeldOut = HeldOut()
    """The validation split."""
    batch_changes: tuple[tuple[int, int], ...] = ()
    """(step, batch size) pairs: batch sizes that hold from a later step on."""

    def packed(self, shards: TokenShards, context: SourceContext, *, whole: bool = False) -> PackedSource:
        """The source of one split over opened shards; `whole` where they hold only that split."""
        held_out = HeldOut(fraction=0.0) if whole else self.held_out
        split: Split = "train" if whole else context.split
        stream = split_stream(shards, held_out, split)
        if len(stream) < 2:
            raise DataError(
                f"{shards.folder}: the {context.split} split has {len(stream)} tokens; at least 2 are needed"
                + f"; {'raise' if context.split == 'validation' else 'lower'} held_out.fraction"
            )
        rows = make_rows(stream, self.sequence_length, self.packing, self.long_documents)
        if not len(rows):
            raise DataError(f"{shards.folder}: no document of the {context.split} split fits in a row")
        training = context.split == "train"
        unique_rows = None
        if training and self.unique_tokens is not None:
            unique_rows = max(1, self.unique_tokens // self.sequence_length)
            if unique_rows > len(rows):
                raise DataError(
                    f"unique_tokens = {self.unique_tokens}: the training split has only {len(stream)} tokens"
                )
        order = SampleOrder(
            rows=len(rows),
            # The validation split has one order for all runs, yet a random one: the first batches stand for the whole.
            seed=context.seed if training else hash64("validation order", held_out.seed),
            batch_sizes=BatchSizes(context.batch_size, self.batch_changes if training else ()),
            shuffle=self.shuffle,
            epochs=self.epochs if training else 1,
            unique_rows=unique_rows,
        )
        fixed = {
            "data": shards.digest,
            "split": context.split,
            **self.model_dump(
                mode="json",
                include={"sequence_length", "packing", "long_documents", "shuffle", "unique_tokens"},
            ),
            "held_out": held_out.model_dump(mode="json"),
        }
        return PackedSource(stream, rows, order, self.sequence_length, self.separate_documents, fixed)


class Shards(PackedSettings):
    """Token shards that `resilin data tokenize` wrote."""

    path: Path
    """The shard folder."""

    def build(self, context: SourceContext) -> PackedSource:
        """The source of one split."""
        return self.packed(TokenShards(self.path), context)


class PackedSource(OrderedSource):
    """Rows of a token stream, by slot: see `resilin.nouns.Source`.

    Attributes:
        stream: the tokens of this split.
        rows: which stretch each sample is.
        order: which sample each slot reads.
        sequence_length: T.
        vocab_size: every id is below it.
        tokenizer: the one stored with the data, or None.
        digest: changes with anything that changes what a slot reads, except seed and batch size.
    """

    def __init__(
        self,
        stream: TokenStream,
        rows: Rows,
        order: SampleOrder,
        sequence_length: int,
        separate_documents: bool,
        fixed: dict[str, object],
    ) -> None:
        self.stream = stream
        self.rows = rows
        self.sequence_length = sequence_length
        self.separate_documents = separate_documents
        shards = stream.shards
        self.vocab_size: int = shards.vocab_size
        self.tokenizer: Tokenizer | None = shards.tokenizer
        super().__init__(order, hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest())
        pad = self.tokenizer.pad_id if self.tokenizer is not None else None
        self._pad = pad if pad is not None else 0

    def fetch(self, step: int, slots: Sequence[int]) -> Batch:
        """The samples of these slots.

        Raises:
            DataError: for slots the step does not have, or token ids outside the vocabulary (a damaged shard).
        """
        return self._batch(self.order.row_of(step, slots), slots, f"step {step}, slot")

    @property
    def pool_parts(self) -> tuple[int, ...]:
        """The samples of this split (of its drawn subset, with `unique_tokens`): see `resilin.data.pool.Pool`."""
        return (self.order.epoch_length,)

    def read(self, samples: Sequence[int]) -> Batch:
        """Samples by number.

        Raises:
            DataError: for numbers outside the pool, or token ids outside the vocabulary.
        """
        numbers = check_samples(samples, self.order.epoch_length)
        return self._batch(self.order.row_of_sample(numbers), range(len(numbers)), "place")

    def _batch(self, rows_B: NDArray[np.int64], slots: Sequence[int], where: str) -> Batch:
        T = self.sequence_length
        starts_B, stops_B = self.rows.bounds(rows_B)
        count = len(starts_B)
        read = np.full((count, T + 1), self._pad, dtype=self.stream.shards.dtype)
        bounds = list(zip(starts_B.tolist(), stops_B.tolist(), strict=True))
        for b, (start, stop) in enumerate(bounds):
            self.stream.read_into(read[b], start, stop)
        if read.size and int(read.max()) >= self.vocab_size:
            b, t = np.argwhere(read >= self.vocab_size)[0].tolist()
            raise DataError(
                f"{self.stream.place(bounds[b][0] + t)}: token id {int(read[b, t])} is not below the vocabulary size "
                f"{self.vocab_size} ({where} {slots[b]}): verify the shards"
            )
        wide = torch.from_numpy(read.astype(np.int64))
        tokens_BT, labels_BT = wide[:, :-1].contiguous(), wide[:, 1:].clone()
        lengths_B = stops_B - starts_B
        if count and int(lengths_B.min()) <= T:
            padding_BT = np.arange(1, T + 1)[None, :] >= lengths_B[:, None]
            labels_BT[torch.from_numpy(padding_BT)] = IGNORED
        if self.stream.shards.has_units:
            units = np.zeros((count, T + 1), np.uint8)
            for b, (start, stop) in enumerate(bounds):
                self.stream.units_into(units[b], start, stop)
            labels_BT[torch.from_numpy(units[:, 1:] == 0)] = IGNORED
        fields = {"tokens": tokens_BT, "labels": labels_BT}
        if self.separate_documents:
            fields |= self._documents(bounds, labels_BT)
        return Batch(torch.from_numpy(np.fromiter(slots, np.int64, count)), fields)

    def _documents(self, bounds: list[tuple[int, int]], labels_BT: Tensor) -> dict[str, Tensor]:
        """Positions and document numbers; a label that belongs to the next document is taken out."""
        T = self.sequence_length
        first_BT = np.zeros((len(bounds), T + 1), bool)
        for b, (start, stop) in enumerate(bounds):
            first_BT[b, self.stream.starts(start, stop) - start] = True
            if stop - start <= T:
                first_BT[b, stop - start] = True  # padding is a document of its own, numbered -1
        labels_BT[torch.from_numpy(first_BT[:, 1:])] = IGNORED
        first_BT = first_BT[:, :T]
        first_BT[:, 0] = True
        places = np.arange(T)[None, :]
        begun = np.maximum.accumulate(np.where(first_BT, places, 0), axis=1)
        numbers = np.cumsum(first_BT, axis=1, dtype=np.int32) - 1
        lengths_B = np.asarray([stop - start for start, stop in bounds], np.int64)
        numbers[places >= lengths_B[:, None]] = -1
        return {
            "positions": torch.from_numpy(places - begun),
            "documents": torch.from_numpy(numbers.astype(np.int32)),
        }
