"""A batch of texts that grow by one token a step: prefill, cache, and the rows that are still going.

Shape suffixes: P distinct prompts, R rows in the cache, T prompt positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resilin.inference.sampling import Sampling, choose
from resilin.inference.scoring import evaluating
from resilin.models.cache import KVCache
from resilin.models.decoder import Decoder

PREFILL_POSITIONS = 8192
"""Prompt positions (padding counted) that go through the model at a time: bounds its activations."""
_FIRST_ROOM = 256  # new tokens a fresh cache has room for; it grows by half when they are used up
_LIVE_SHARE = 0.75  # the cache is compacted when fewer of its rows than this are live


class NewToken(NamedTuple):
    """A token drawn in this step."""

    row: int
    token: int
    logprob: float
    draw_logprob: float


def enlarged(cache: KVCache, model: Decoder, capacity: int) -> KVCache:
    """The same cache with room for `capacity` tokens a row."""
    larger = KVCache.of(model, len(cache.length_B), capacity, cache.keys_LBKCD.dtype)
    larger.keys_LBKCD[..., : cache.capacity, :] = cache.keys_LBKCD[..., : cache.capacity, :]
    larger.values_LBKCD[..., : cache.capacity, :] = cache.values_LBKCD[..., : cache.capacity, :]
    larger.length_B, larger.reach, larger.ragged = cache.length_B, cache.reach, cache.ragged
    return larger


class Decoding:
    """Rows of text and their cache.

    Args:
        model: on any device; its mode is left as it was.
        prompts: non-empty token ids of each row; equal prompts are read once.
        sampling: how tokens are chosen.
        longest: no row will hold more tokens than this, prompt included.
        rows: the numbers that key each row's draws; None: 0, 1, 2, ...
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        longest: int,
        rows: Sequence[int] | None = None,
    ) -> None:
        self._model, self._sampling, self._longest = model, sampling, longest
        self._device = next(model.parameters()).device
        self._drawn = 0
        self.live: list[int] = list(range(len(prompts)))
        """Rows still going, in order."""
        self._cached = list(self.live)  # the row in each line of the cache; some may be done
        self._numbers = torch.as_tensor(self.live if rows is None else list(rows), dtype=torch.int64)
        if not prompts:
            return
        self._seen_RV: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            seen_RV = torch.zeros(len(prompts), model.settings.vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                seen_RV[row, torch.as_tensor(prompt)] = True
            self._seen_RV = seen_RV.to(self._device)
        with evaluating(model):
            self._hidden_RD = self._prefill(prompts)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the distinct prompts into the cache; the last hidden state of each row."""
        distinct = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        width = max(len(prompt) for prompt in distinct)
        # Padding stands at the left, so that every row's last token is in the last column.
        tokens_PT = torch.zeros(len(distinct), width, dtype=torch.int64)
        documents_PT = torch.full((len(distinct), width), -1, dtype=torch.int32)
        for line, prompt in enumerate(distinct):
            tokens_PT[line, width - len(prompt) :] = torch.as_tensor(prompt)
            documents_PT[line, width - len(prompt) :] = 0
        padded = min(len(prompt) for prompt in distinct) < width
        cache = KVCache.of(self._model, len(distinct), min(self._longest, width + _FIRST_ROOM))
        columns = max(1, PREFILL_POSITIONS // len(distinct))
        hidden_PD = torch.empty(0)
        for start in range(0, width, columns):
            part = slice(start, start + columns)
            documents = documents_PT[:, part].to(self._device) if padded else None
            output = self._model(tokens_PT[:, part].to(self._device), None, documents, cache=cache)
            hidden_PD = output.hidden_BTD[:, -1]
        self._cache = cache
        if len(distinct) == len(prompts):
            return hidden_PD
        lines = {prompt: line for line, prompt in enumerate(distinct)}
        of_row = torch.tensor([lines[tuple(prompt)] for prompt in prompts], device=self._device)
        cache.keep_rows(of_row)
        return hidden_PD[of_row]

    def step(self) -> list[NewToken]:
        """Draw the next token of every live row."""
        # Never around a `yield`: the caller's own code would run without gradients too.
        with evaluating(self._model):
            if self._drawn:
                self._advance()
            logits_RV = self._model.logits(self._hidden_RD)
            numbers_R = self._numbers[self._cached]
            tokens_R, logprobs_R, draws_R = choose(logits_RV, self._sampling, numbers_R, self._drawn, self._seen_RV)
        self._tokens_R = tokens_R
        self._drawn += 1
        tokens, logprobs, draws = tokens_R.tolist(), logprobs_R.tolist(), draws_R.tolist()
        return [NewToken(self._cached[line], tokens[line], logprobs[line], draws[line]) for line in self._live_lines()]

    def drop(self, rows: Sequence[int]) -> None:
        """These rows are done: nothing more is drawn for them, and soon nothing computed."""
        if not rows:
            return
        gone = set(rows)
        self.live = [row for row in self.live if row not in gone]
        if self.live and len(self.live) <= _LIVE_SHARE * len(self._cached):
            lines = torch.tensor(self._live_lines(), device=self._device)
            self._cache.keep_rows(lines)
            self._tokens_R = self._tokens_R[lines]
            self._seen_RV = self._seen_RV[lines] if self._seen_RV is not None else None
            self._cached = list(self.live)

    def _live_lines(self) -> list[int]:
        live = set(self.live)
        return [line for line, row in enumerate(self._cached) if row in live]

    def _advance(self) -> None:
        """Feed the tokens drawn last."""
        if self._cache.reach + 1 > self._cache.capacity:
            room = max(_FIRST_ROOM, self._cache.capacity // 2)
            # One more than the longest row: lines of the cache that are done still take a token each step.
            self._cache = enlarged(self._cache, self._model, self._cache.capacity + room)
        if self._seen_RV is not None:
            self._seen_RV[torch.arange(len(self._tokens_R), device=self._device), self._tokens_R] = True
        output = self._model(self._tokens_R[:, None], cache=self._cache)
        self._hidden_RD = output.hidden_BTD[:, -1]
