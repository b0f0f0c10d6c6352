"""Prompts as a source, for answers that the model writes itself.

Legend: B slots, T tokens of the longest prompt.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from resilin.data.chat import encode_chat
from resilin.data.errors import DataError
from resilin.data.order import SampleOrder
from resilin.data.ordered import TableBatches
from resilin.data.prompt_rows import Prompt, read_prompt
from resilin.data.row_files import Row
from resilin.data.row_sources import RowSourceSettings
from resilin.data.settings import SourceContext
from resilin.data.tokenizer import Tokenizer
from resilin.nouns import Batch

LongPrompts = Literal["drop", "error"]


class PromptSource(RowSourceSettings):
    """Prompts with what their answers are checked against, in any of the forms of `resilin.data.prompt_rows`."""

    prompt_length: Annotated[int, Field(ge=1)] = 2048
    """Tokens of a prompt at most."""
    long_prompts: LongPrompts = "drop"
    """What becomes of a longer one: left out and counted, or an error. A prompt is never cut."""
    texts: Literal["plain", "chat"] = "plain"
    """A prompt that is a text and no message is continued as it is, or is a user's message."""
    needs_truth: bool = True
    """Refuse rows without `ground_truth` and `dataset`; False: for rewards that need neither."""

    def build(self, context: SourceContext) -> PromptBatches:
        """The source of one split."""
        tokenizer = self.loaded_tokenizer()
        rows, whole = self.rows(context)
        table = PromptTable(rows, tokenizer, self)
        if table.dropped:
            lost = ", ".join(f"{count} {reason}" for reason, count in sorted(table.dropped.items()))
            sys.stderr.write(f"resilin: of {len(rows)} prompts {len(table)} are used; left out: {lost}\n")
        if not len(table):
            raise DataError(f"none of {len(rows)} prompts fits in {self.prompt_length} tokens")
        mine, order = self.ordered(table.keys, context, whole)
        fixed = {"data": table.digest, "split": context.split, "whole": whole, "shuffle": self.shuffle}
        fixed |= {"held_out": self.held_out.model_dump(mode="json"), "pad": self.pad}
        width = self.prompt_length if self.pad == "length" else None
        return PromptBatches(table, mine, order, tokenizer, width, fixed)


class PromptTable:
    """Prompts as tokens, beside the rows they came from.

    Attributes:
        rows: the original rows that are used.
        prompts: what was read from each.
        ids: tokens of each.
        keys: of each, a hash of its tokens.
        end_ids: tokens that end an answer.
        dropped: how many rows were left out, by reason.
        digest: SHA-256 of all tokens and rows, in order.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Tokenizer, settings: PromptSource) -> None:
        self.rows: list[dict[str, Any]] = []
        self.prompts: list[Prompt] = []
        self.ids: list[NDArray[np.int32]] = []
        self.keys: list[str] = []
        self.dropped: Counter[str] = Counter()
        self.end_ids = frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id})
        digest = hashlib.sha256()
        spoken = False
        for row in rows:
            prompt = read_prompt(row, needs_truth=settings.needs_truth)
            said = prompt.prompt
            if isinstance(said, str) and settings.texts == "chat":
                said = [{"role": "user", "content": said}]
            try:
                ids = prompt_ids(tokenizer, said)
            except DataError as error:
                raise row.error(str(error)) from None
            spoken = spoken or not isinstance(said, str)
            if not ids:
                raise row.error("the prompt has no tokens")
            if len(ids) > settings.prompt_length:
                if settings.long_prompts == "error":
                    raise row.error(
                        f"the prompt has {len(ids)} tokens, more than prompt_length = {settings.prompt_length}: raise "
                        "it, or set long_prompts to drop"
                    )
                self.dropped["too long"] += 1
                continue
            raw = np.asarray(ids, np.int32)
            self.rows.append(row.value)
            self.prompts.append(prompt)
            self.ids.append(raw)
            self.keys.append(hashlib.sha256(raw.tobytes()).hexdigest())
            digest.update(self.keys[-1].encode())
            digest.update(json.dumps(row.value, sort_keys=True, default=str).encode())
        if spoken:
            self.end_ids |= end_of_turn(tokenizer)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)


def prompt_ids(tokenizer: Tokenizer, prompt: str | list[dict[str, Any]]) -> list[int]:
    """A prompt as tokens that an answer follows: a text as it is, messages in the tokenizer's chat form."""
    if not isinstance(prompt, str):
        return encode_chat(tokenizer, prompt, add_generation_prompt=True).ids
    begin = [tokenizer.bos_id] if tokenizer.config.get("add_bos_token") is True and tokenizer.bos_id is not None else []
    return [*begin, *tokenizer.encode(prompt)]


def end_of_turn(tokenizer: Tokenizer) -> frozenset[int]:
    """The special token with which the chat template ends an answer; none where it ends with plain text."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokens = encode_chat(tokenizer, talk, train_on="last")
    last = [token for token, unit in zip(tokens.ids, tokens.units, strict=True) if unit][-1]
    return frozenset({last}) & tokenizer.special_ids


class PromptBatches(TableBatches):
    """Prompts, by slot: see `resilin.nouns.Source`.

    A batch has the fields `prompt_tokens` (B, T) int64, padded in front; `prompt_mask` (B, T) bool, True on the prompt;
    and `row` (B,) int64, the number of the row in the whole table.

    Attributes:
        table: all prompts, of both splits.
        mine: the prompts of this split.
        tokenizer: gave the ids.
        vocab_size: every id is below it.
        end_ids: tokens that end an answer: the end of text and the chat template's end of turn.
        digest: changes with anything that changes what a slot reads, except seed and batch size.
        dropped: rows that were left out, by reason.
    """

    def __init__(
        self,
        table: PromptTable,
        mine: NDArray[np.int64],
        order: SampleOrder,
        tokenizer: Tokenizer,
        width: int | None,
        fixed: Mapping[str, object],
    ) -> None:
        super().__init__(mine, order, tokenizer, width, fixed, table.dropped)
        self.table = table
        self.end_ids = table.end_ids

    @property
    def count(self) -> int:
        """Prompts of the whole table: row numbers are below it."""
        return len(self.table)

    def row(self, index: int) -> dict[str, Any]:
        """The original row of a prompt, for verifiers."""
        return self.table.rows[index]

    def prompt(self, index: int) -> Prompt:
        """What was read from that row: prompt, truth and verifier's name."""
        return self.table.prompts[index]

    def batch(self, rows: Sequence[int], slots: Sequence[int] | None = None) -> Batch:
        """Some prompts of the table as a batch; `slots` numbers them, else 0, 1, ..."""
        width = self._width or max((len(self.table.ids[row]) for row in rows), default=0)
        tokens_BT = np.full((len(rows), width), self._pad, np.int64)
        mask_BT = np.zeros((len(rows), width), bool)
        for b, row in enumerate(rows):
            ids = self.table.ids[row]
            tokens_BT[b, width - len(ids) :] = ids
            mask_BT[b, width - len(ids) :] = True
        return Batch(
            torch.as_tensor(list(range(len(rows)) if slots is None else slots), dtype=torch.int64),
            {
                "prompt_tokens": torch.from_numpy(tokens_BT),
                "prompt_mask": torch.from_numpy(mask_BT),
                "row": torch.as_tensor(list(rows), dtype=torch.int64),
            },
        )
