"""Preferences as a source: two answers to one prompt, padded side by side.

Legend: B slots, T inputs of a row.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from resilin.data.chat import ChatTokens, encode_chat, encode_text_answer
from resilin.data.errors import DataError
from resilin.data.order import SampleOrder
from resilin.data.ordered import TableBatches
from resilin.data.packed import IGNORED
from resilin.data.preference_rows import Preference, read_preference
from resilin.data.row_files import Row
from resilin.data.row_sources import RowSourceSettings
from resilin.data.settings import SourceContext
from resilin.data.tokenizer import Tokenizer
from resilin.nouns import Batch

LongPairs = Literal["cut_end", "cut_start", "drop", "error"]
_Side = Literal["chosen", "rejected"]


class PreferenceSource(RowSourceSettings):
    """Pairs of a better and a worse answer, in any of the forms of `resilin.data.preference_rows`."""

    sequence_length: Annotated[int, Field(ge=1)] = 2048
    """Inputs of a row at most (T): prompt and answer together."""
    long_pairs: LongPairs = "cut_end"
    """What becomes of a pair that is longer: its ends or its beginnings are cut, it is dropped, or it is an error."""

    def build(self, context: SourceContext) -> PairBatches:
        """The source of one split."""
        tokenizer = self.loaded_tokenizer()
        rows, whole = self.rows(context)
        pairs = encode_pairs(rows, tokenizer, self.sequence_length, self.long_pairs)
        if pairs.dropped:
            lost = ", ".join(f"{count} {reason}" for reason, count in sorted(pairs.dropped.items()))
            sys.stderr.write(f"resilin: of {len(rows)} preference rows {len(pairs)} are used; left out: {lost}\n")
        if not len(pairs):
            raise DataError(f"none of {len(rows)} preference rows fits in {self.sequence_length} tokens")
        mine, order = self.ordered(pairs.prompts, context, whole)
        fixed = {"data": pairs.digest, "split": context.split, "whole": whole, "shuffle": self.shuffle}
        fixed |= {"held_out": self.held_out.model_dump(mode="json"), "pad": self.pad}
        width = self.sequence_length if self.pad == "length" else None
        return PairBatches(pairs, mine, order, tokenizer, width, fixed)


class Pairs:
    """All pairs of some rows as tokens.

    Attributes:
        rows: for each pair, the index of the row it was read from.
        prompts: of each pair, a hash of its prompt.
        dropped: how many rows were left out, by reason.
        digest: SHA-256 of the tokens and masks of all pairs, in order.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.prompts: list[str] = []
        self.dropped: Counter[str] = Counter()
        self._ids: dict[_Side, list[NDArray[np.int32]]] = {"chosen": [], "rejected": []}
        self._units: dict[_Side, list[NDArray[np.bool_]]] = {"chosen": [], "rejected": []}
        self._hash = hashlib.sha256()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        """Changes with any token of any pair, and with their order."""
        return self._hash.hexdigest()

    def add(self, row: int, prompt: str, chosen: ChatTokens, rejected: ChatTokens) -> None:
        """Append a pair."""
        self.rows.append(row)
        self.prompts.append(prompt)
        sides: tuple[tuple[_Side, ChatTokens], ...] = (("chosen", chosen), ("rejected", rejected))
        for side, tokens in sides:
            ids, units = np.asarray(tokens.ids, np.int32), np.asarray(tokens.units, bool)
            self._ids[side].append(ids)
            self._units[side].append(units)
            self._hash.update(len(ids).to_bytes(8, "little") + ids.tobytes() + units.tobytes())

    def length(self, pair: int) -> int:
        """Inputs of the longer of a pair's two rows."""
        return max(len(self._ids["chosen"][pair]), len(self._ids["rejected"][pair])) - 1

    def padded(self, side: _Side, pairs: Sequence[int], width: int, pad: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, width) and labels (B, width), already shifted, of one answer of some pairs."""
        tokens_BT = np.full((len(pairs), width), pad, np.int64)
        labels_BT = np.full((len(pairs), width), IGNORED, np.int64)
        for b, pair in enumerate(pairs):
            ids, units = self._ids[side][pair], self._units[side][pair]
            size = len(ids) - 1
            tokens_BT[b, :size] = ids[:-1]
            labels_BT[b, :size] = np.where(units[1:], ids[1:], IGNORED)
        return torch.from_numpy(tokens_BT), torch.from_numpy(labels_BT)


def encode_preference(preference: Preference, tokenizer: Tokenizer) -> tuple[ChatTokens, ChatTokens]:
    """Both answers of a preference behind its prompt; only the answers are to be learnt."""
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    if isinstance(prompt, str):
        assert isinstance(chosen, str)
        assert isinstance(rejected, str)
        return encode_text_answer(tokenizer, prompt, chosen), encode_text_answer(tokenizer, prompt, rejected)
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    return (
        encode_chat(tokenizer, [*prompt, *chosen], train_on=len(prompt)),
        encode_chat(tokenizer, [*prompt, *rejected], train_on=len(prompt)),
    )


def encode_pairs(
    rows: Sequence[Row], tokenizer: Tokenizer, sequence_length: int, long_pairs: LongPairs = "cut_end"
) -> Pairs:
    """The pairs of some rows as tokens.

    A pair of which cutting leaves an answer without a single token is dropped and counted: its loss would compare an
    answer with nothing.

    Raises:
        DataError: with file and line, for a row that is no preference, a template that does not fit it, or (with
            "error") a pair that is too long.
    """
    pairs = Pairs()
    room = sequence_length + 1
    for number, row in enumerate(rows):
        preference = read_preference(row)
        try:
            both = encode_preference(preference, tokenizer)
        except DataError as error:
            raise row.error(str(error)) from None
        longest = max(len(tokens.ids) for tokens in both)
        if longest > room:
            if long_pairs == "error":
                raise row.error(
                    f"has {longest} tokens; a row holds {room}: raise sequence_length, or set long_pairs to cut_end, "
                    "cut_start or drop"
                )
            if long_pairs == "drop":
                pairs.dropped["too long"] += 1
                continue
            cut = slice(0, room) if long_pairs == "cut_end" else slice(-room, None)
            both = (
                ChatTokens(both[0].ids[cut], both[0].units[cut]),
                ChatTokens(both[1].ids[cut], both[1].units[cut]),
            )
        if not all(any(tokens.units[1:]) for tokens in both):
            pairs.dropped["with an answer cut away"] += 1
            continue
        prompt = hashlib.sha256(json.dumps(preference.prompt, sort_keys=True).encode()).hexdigest()
        pairs.add(number, prompt, *both)
    return pairs


class PairBatches(TableBatches):
    """Pairs of answers, by slot: see `resilin.nouns.Source`.

    A batch has the fields `chosen_tokens`, `chosen_labels`, `rejected_tokens`, `rejected_labels`: (B, T) int64, with
    labels already shifted (`labels[b, t]` is what follows `tokens[b, t]`; -100 is not a unit), padded behind; and
    `pair`: (B,) int64, the number of the pair in the whole table, by which reference log-probabilities are kept.

    Attributes:
        pairs: the whole table, of both splits.
        mine: the pairs of this split.
        tokenizer: gave the ids.
        vocab_size: every id is below it.
        digest: changes with anything that changes what a slot reads, except seed and batch size.
        data_digest: of the whole table: pair numbers of equal `data_digest` mean the same pairs.
        dropped: rows that were left out, by reason.
    """

    def __init__(
        self,
        pairs: Pairs,
        mine: NDArray[np.int64],
        order: SampleOrder,
        tokenizer: Tokenizer,
        width: int | None,
        fixed: Mapping[str, object],
    ) -> None:
        super().__init__(mine, order, tokenizer, width, fixed, pairs.dropped)
        self.pairs = pairs
        self.data_digest = pairs.digest

    @property
    def count(self) -> int:
        """Pairs of the whole table: pair numbers are below it."""
        return len(self.pairs)

    def batch(self, rows: Sequence[int], slots: Sequence[int] | None = None) -> Batch:
        """Some pairs of the table as a batch; `slots` numbers them, else 0, 1, ..."""
        width = self._width or max((self.pairs.length(pair) for pair in rows), default=0)
        chosen, chosen_labels = self.pairs.padded("chosen", rows, width, self._pad)
        rejected, rejected_labels = self.pairs.padded("rejected", rows, width, self._pad)
        return Batch(
            torch.as_tensor(list(range(len(rows)) if slots is None else slots), dtype=torch.int64),
            {
                "chosen_tokens": chosen,
                "chosen_labels": chosen_labels,
                "rejected_tokens": rejected,
                "rejected_labels": rejected_labels,
                "pair": torch.as_tensor(list(rows), dtype=torch.int64),
            },
        )
