"""A batch of texts that grow by one token a step, and others that wait for their turn.

Each text that grows has a line of the cache. A text that is done leaves its line to one that waits, so that the batch
stays full while long answers go on; when none waits, the cache shrinks to the lines in use.

Shape suffixes: P distinct prompts, R lines, T prompt positions, N draws ahead, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resilin.inference.sampling import Sampling, choose, uniform_numbers
from resilin.inference.scoring import evaluating
from resilin.models.cache import KVCache
from resilin.models.decoder import Decoder
from resilin.models.linear import PackedWeight
from resilin.objective.vocabulary import whole_head

PREFILL_POSITIONS = 8192
"""Prompt positions (padding counted) that go through the model at a time: bounds its activations."""
_FIRST_ROOM = 256  # new tokens a fresh cache has room for; it grows by half when they are used up
_LIVE_SHARE = 0.75  # the cache is compacted when fewer of its lines than this are in use
_REFILL_SHARE = 0.125  # lines are given to waiting texts when at least this share is free: prompts are read together
_AHEAD = 64  # draws of a row whose random numbers are computed at once


class NewToken(NamedTuple):
    """A token drawn in this step."""

    row: int
    token: int
    logprob: float
    draw_logprob: float


class Decoding:
    """Rows of text and their cache.

    What a row says depends on its prompt, its number and the sampling; not on when its turn comes, nor beside whom.

    Args:
        model: on any device; its mode is left as it was.
        prompts: non-empty token ids of each row; equal prompts that start together, or beside one that still grows,
            are read once.
        sampling: how tokens are chosen.
        longest: no row will hold more tokens than this, prompt included.
        numbers: by which each row's draws are keyed; None: 0, 1, 2, ...
        lines: rows that grow side by side; None: all.
        in_order: rows begin in the order they are given; else those with long prompts begin first.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        longest: int,
        numbers: Sequence[int] | None = None,
        lines: int | None = None,
        in_order: bool = False,
    ) -> None:
        self._model, self._sampling, self._longest = model, sampling, longest
        self._device = next(model.parameters()).device
        self._prompts = [tuple(prompt) for prompt in prompts]
        self._numbers = torch.as_tensor(range(len(prompts)) if numbers is None else list(numbers), dtype=torch.int64)
        order: Sequence[int] = range(len(prompts))
        # Prompts of like length together: less padding is read.
        if lines is not None and lines < len(prompts) and not in_order:
            order = sorted(order, key=lambda row: -len(prompts[row]))
        self._waiting = deque(order)
        self._clock = 0
        """Tokens fed to the cache's lines so far."""
        self._drawn = 0
        """Steps taken."""
        self._row_of: list[int] = []
        """The row in each line; some may be done."""
        self._line_of: dict[int, int] = {}
        """The line of each row that is going."""
        self._ahead_RN: Tensor | None = None
        """Random numbers of each line, from the step `_ahead_from` on."""
        self._ahead_from = 0
        self._tokens_R = torch.empty(0, dtype=torch.int64)
        """The tokens drawn last."""
        if prompts:
            with evaluating(model):
                self._begin(lines or len(prompts))

    @property
    def going(self) -> bool:
        """Whether any row still grows or waits."""
        return bool(self._line_of or self._waiting)

    # -- lines --------------------------------------------------------------------------------------------------

    def _begin(self, lines: int) -> None:
        """Read the first prompts into a fresh cache."""
        self._row_of = [self._waiting.popleft() for _ in range(min(lines, len(self._waiting)))]
        self._line_of = {row: line for line, row in enumerate(self._row_of)}
        prompts = [self._prompts[row] for row in self._row_of]
        distinct = list(dict.fromkeys(prompts))
        width = max(map(len, distinct))
        capacity = min(self._longest, width + _FIRST_ROOM)
        shared = len(distinct) < len(prompts)
        self._cache, self._hidden_RD = self._read(distinct, width if shared else capacity)
        if shared:
            places = {prompt: place for place, prompt in enumerate(distinct)}
            of_line = self._index([places[prompt] for prompt in prompts])
            read, self._cache = self._cache, KVCache.of(self._model, len(prompts), capacity)
            self._cache.fill(self._index(range(len(prompts))), read, of_line, width)
            self._cache.ragged = read.ragged
            self._hidden_RD = self._hidden_RD[of_line]
        self._start_RD = self._hidden_RD.clone() if self._waiting else None
        """What the model said at the end of each line's prompt, for further rows with the same one."""
        self._born = [0] * len(prompts)
        """The step with which each line's row began."""
        self._offset = [len(prompt) for prompt in prompts]
        """Tokens of each line less those of the clock."""
        self._seen_RV: Tensor | None = None
        if self._sampling.repetition_penalty != 1.0:
            self._seen_RV = torch.stack([self._seen(prompt) for prompt in prompts])
        weight = whole_head(self._model, "decoding")
        plain = self._model.stream_dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        packs = len(prompts) > 1 and plain and PackedWeight.takes(weight)
        self._head = PackedWeight(weight) if packs else None

    def _read(self, prompts: Sequence[tuple[int, ...]], capacity: int) -> tuple[KVCache, Tensor]:
        """Prompts in a cache of their own, and the last hidden state of each (P, D)."""
        width = max(map(len, prompts))
        # Padding stands at the left, so that every row's last token is in the last column.
        tokens_PT = torch.zeros(len(prompts), width, dtype=torch.int64)
        documents_PT = torch.full((len(prompts), width), -1, dtype=torch.int32)
        for line, prompt in enumerate(prompts):
            tokens_PT[line, width - len(prompt) :] = torch.as_tensor(prompt)
            documents_PT[line, width - len(prompt) :] = 0
        padded = min(map(len, prompts)) < width
        cache = KVCache.of(self._model, len(prompts), capacity)
        columns = max(1, PREFILL_POSITIONS // len(prompts))
        hidden_PD = torch.empty(0)
        for start in range(0, width, columns):
            part = slice(start, start + columns)
            documents = documents_PT[:, part].to(self._device) if padded else None
            output = self._model(tokens_PT[:, part].to(self._device), None, documents, cache=cache)
            hidden_PD = output.hidden_BTD[:, -1]
        return cache, hidden_PD

    def _seen(self, prompt: Sequence[int]) -> Tensor:
        seen_V = torch.zeros(self._model.settings.vocab_size, dtype=torch.bool)
        seen_V[torch.as_tensor(prompt)] = True
        return seen_V.to(self._device)

    def _refill(self) -> None:
        """Give the free lines to rows that wait."""
        free = [line for line, row in enumerate(self._row_of) if row not in self._line_of]
        if not self._waiting or (self._line_of and len(free) < _REFILL_SHARE * len(self._row_of)):
            return
        # A row that has grown has its prompt's keys still, but no longer its states.
        kept = self._line_of if self._cache.states is None else {}
        twins = {self._prompts[row]: line for row, line in kept.items()}
        begun: dict[tuple[int, ...], list[int]] = {}
        for line in free[: len(self._waiting)]:
            row = self._waiting.popleft()
            self._row_of[line], self._line_of[row] = row, line
            self._born[line], self._offset[line] = self._drawn, len(self._prompts[row]) - self._clock
            begun.setdefault(self._prompts[row], []).append(line)
        self._make_room(max(map(len, begun)))
        new = [prompt for prompt in begun if prompt not in twins]
        assert self._start_RD is not None
        if new:
            cache, hidden_PD = self._read(new, max(map(len, new)))
            first = self._index([begun[prompt][0] for prompt in new])
            self._cache.fill(first, cache, torch.arange(len(new), device=self._device), cache.capacity)
            self._start_RD[first] = hidden_PD
            twins |= {prompt: begun[prompt][0] for prompt in new}
        for prompt, lines in begun.items():
            twin, others = twins[prompt], [line for line in lines if line != twins[prompt]]
            if others:
                to, of = self._index(others), self._index([twin] * len(others))
                self._cache.fill(to, self._cache, of, len(prompt))
                self._start_RD[to] = self._start_RD[of]
        started = [line for lines in begun.values() for line in lines]
        self._hidden_RD[self._index(started)] = self._start_RD[self._index(started)]
        if self._seen_RV is not None:
            for line in started:
                self._seen_RV[line] = self._seen(self._prompts[self._row_of[line]])
        self._cache.reach = self._clock + max(self._offset)
        self._ahead_RN = None
        if not self._waiting:
            self._compact()

    def drop(self, rows: Sequence[int]) -> None:
        """These rows are done: nothing more is drawn for them, and soon nothing computed."""
        if not rows:
            return
        gone = [self._line_of.pop(row) for row in rows]
        if self._waiting:
            self._cache.free(self._index(gone))
            for line in gone:  # counted again from here, so that the longest line is known without asking the device
                self._offset[line] = -self._clock
            self._cache.reach = self._clock + max(self._offset)
        else:
            self._compact()

    def _compact(self) -> None:
        """Keep only the lines in use, where enough others are none."""
        if not self._line_of or len(self._line_of) > _LIVE_SHARE * len(self._row_of):
            return
        kept = sorted(self._line_of.values())
        lines = self._index(kept)
        self._cache.keep_rows(lines)
        self._tokens_R, self._hidden_RD = self._tokens_R[lines], self._hidden_RD[lines]
        self._seen_RV = self._seen_RV[lines] if self._seen_RV is not None else None
        self._ahead_RN = self._ahead_RN[lines] if self._ahead_RN is not None else None
        self._row_of, self._born, self._offset = (
            [of_line[line] for line in kept] for of_line in (self._row_of, self._born, self._offset)
        )
        self._line_of = {row: line for line, row in enumerate(self._row_of)}
        self._cache.reach = self._clock + max(self._offset)

    def _index(self, lines: Sequence[int]) -> Tensor:
        return torch.tensor(lines, dtype=torch.int64, device=self._device)

    def _make_room(self, tokens: int) -> None:
        """Let every line of the cache hold so many tokens."""
        if tokens > self._cache.capacity:
            # Beyond the longest row: lines that are done still take a token each step.
            self._cache.enlarge(max(tokens, self._cache.capacity + max(_FIRST_ROOM, self._cache.capacity // 2)))

    # -- steps --------------------------------------------------------------------------------------------------

    def step(self) -> list[NewToken]:
        """Draw the next token of every row that is going, or whose turn has come."""
        # Never around a `yield`: the caller's own code would run without gradients too.
        with evaluating(self._model):
            if self._drawn and self._line_of:
                self._advance()
            self._refill()
            tokens_R, logprobs_R, draws_R = self._choose()
        self._tokens_R = tokens_R
        self._drawn += 1
        tokens, logprobs, draws = tokens_R.tolist(), logprobs_R.tolist(), draws_R.tolist()
        return [NewToken(row, tokens[line], logprobs[line], draws[line]) for row, line in self._line_of.items()]

    def _advance(self) -> None:
        """Feed the tokens drawn last."""
        self._make_room(self._cache.reach + 1)
        if self._seen_RV is not None:
            self._seen_RV[torch.arange(len(self._tokens_R), device=self._device), self._tokens_R] = True
        output = self._model(self._tokens_R[:, None], cache=self._cache)
        self._hidden_RD = output.hidden_BTD[:, -1]
        self._clock += 1

    def _choose(self) -> tuple[Tensor, Tensor, Tensor]:
        logits_RV = self._model.logits(self._hidden_RD, self._head)
        numbers_R, n_R = self._numbers[self._row_of], self._drawn - torch.tensor(self._born)
        uniform_R = None if self._sampling.greedy else self._uniform(numbers_R, n_R)
        return choose(logits_RV, self._sampling, numbers_R, n_R, self._seen_RV, uniform_R)

    def _uniform(self, numbers_R: Tensor, n_R: Tensor) -> Tensor:
        """The random number of each line for this step."""
        if self._ahead_RN is None or self._drawn - self._ahead_from == _AHEAD:
            n_RN = n_R[:, None] + torch.arange(_AHEAD)
            self._ahead_RN = uniform_numbers(self._sampling.seed, numbers_R, n_RN).to(self._device)
            self._ahead_from = self._drawn
        return self._ahead_RN[:, self._drawn - self._ahead_from]
