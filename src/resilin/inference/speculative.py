"""Draft and verify: somebody cheap proposes tokens, the model checks them all at once.

What comes out is the model's: with temperature 0 its own greedy text, else samples of its distribution (Leviathan et
al., "Fast inference from transformers via speculative decoding", 2023, algorithm 1). Who proposes is a `Draft`: a
smaller part of the model (`resilin.nested.speculative`), or modules behind it that were trained to predict tokens
further on (`resilin.modalities.mtp_draft`).

Shapes: T tokens, V vocabulary, D hidden size, N proposals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from resilin.config import UserError
from resilin.inference.generate import check_prompts
from resilin.inference.sampling import GREEDY, Sampling, draw, filtered
from resilin.inference.scoring import evaluating
from resilin.keys import Keys
from resilin.models.cache import KVCache
from resilin.models.decoder import Decoder

Choose = Callable[[Tensor, int], tuple[int, Tensor]]
"""(logits (1, V), how many proposals there are already) -> a token, and the logits that it was drawn from."""


class SpeculationError(UserError, ValueError):
    """A text that cannot be drafted and verified so; the text says why."""


class Draft(Protocol):
    """Who proposes tokens."""

    def begin(self, cache: KVCache) -> None:
        """A text begins, whose keys and values the model keeps here."""

    def heard(self, tokens: Sequence[int], hidden_TD: Tensor) -> None:
        """The next tokens of the text, which the model has read, and what it made of each."""

    def propose(self, pending: int, count: int, choose: Choose) -> tuple[list[int], list[Tensor]]:
        """At most `count` tokens that may follow, and the logits (1, V) that each was drawn from.

        Args:
            pending: the text's last token, which the model has not read yet.
            count: the most that are wanted.
            choose: draws a token.
        """


@dataclass
class Drafts:
    """What became of the proposals.

    Attributes:
        proposed: tokens that the draft made.
        accepted: of them, how many the model kept.
        rounds: passes of the model, beside that over the prompt.
    """

    proposed: int = 0
    accepted: int = 0
    rounds: int = 0

    @property
    def rate(self) -> float:
        """Share of proposals that were kept; NaN before the first."""
        return self.accepted / self.proposed if self.proposed else float("nan")


@dataclass
class Speculation:
    """A text that grows by drafting and verifying; iterate over it for the new tokens.

    Args:
        model: whose text it is.
        prompt: token ids, at least one.
        draft: who proposes.
        max_new_tokens: the most tokens that are added; the model's positions may end it before.
        ahead: tokens that are proposed at a time, at most.
        sampling: temperature, top-k, top-p and min-p; a repetition penalty is refused.
        stop_ids: tokens that end the text; they are given too.
        verifying: around each pass of the model over the text.

    Attributes:
        drafts: what became of the proposals so far.

    Raises:
        SpeculationError: nothing would be proposed, or what was not kept could not be taken back.
    """

    model: Decoder
    prompt: Sequence[int]
    draft: Draft
    max_new_tokens: int = 256
    ahead: int = 4
    sampling: Sampling = GREEDY
    stop_ids: frozenset[int] = frozenset()
    verifying: Callable[[], AbstractContextManager[None]] = nullcontext
    drafts: Drafts = field(default_factory=Drafts)

    def __post_init__(self) -> None:
        check_prompts(self.model, [self.prompt])
        if self.ahead < 1:
            raise SpeculationError(f"ahead is {self.ahead}: at least one token has to be proposed at a time")
        if self.sampling.repetition_penalty != 1.0:
            raise SpeculationError("a repetition penalty depends on what is being verified: set it to 1")
        if self.model.row_states(1) is not None:
            raise SpeculationError(
                "the states of Mamba-2 layers cannot take back tokens that were not kept: generate without a draft"
            )

    def __iter__(self) -> Iterator[int]:
        left = min(self.max_new_tokens, self.model.settings.max_positions - len(self.prompt))
        cache = KVCache.of(self.model, 1, len(self.prompt) + left + self.ahead + 1)
        self.draft.begin(cache)
        pending, place = int(self.prompt[-1]), 0
        if len(self.prompt) > 1:
            read = [int(token) for token in self.prompt[:-1]]
            self.draft.heard(read, self._read(read, cache))
        while left > 0:
            count = min(self.ahead, left - 1)
            proposed, draft_NV = self.draft.propose(pending, count, partial(self._draft, place)) if count else ([], [])
            hidden_TD = self._read([pending, *proposed], cache)
            kept, last = self._verified(proposed, draft_NV, self._logits(hidden_TD), place)
            cache.take_back(len(proposed) - len(kept))
            self.draft.heard([pending, *kept], hidden_TD[: len(kept) + 1])
            self.drafts.rounds += 1
            self.drafts.proposed += len(proposed)
            self.drafts.accepted += len(kept)
            for token in (*kept, last):
                yield token
                left -= 1
                if token in self.stop_ids:
                    return
            pending, place = last, place + count + 1

    def _read(self, tokens: list[int], cache: KVCache) -> Tensor:
        """(T, D): what the model makes of each token, which is now in the cache."""
        tokens_1T = torch.tensor([tokens], device=cache.length_B.device)
        with evaluating(self.model), self.verifying():
            hidden_TD: Tensor = self.model(tokens_1T, cache=cache).hidden_BTD[0]
        return hidden_TD

    def _logits(self, hidden_TD: Tensor) -> Tensor:
        with evaluating(self.model), self.verifying():
            return self._filtered(self.model.logits(hidden_TD))

    def _draft(self, place: int, logits_1V: Tensor, made: int) -> tuple[int, Tensor]:
        logits_1V = self._filtered(logits_1V)
        return self._chosen(logits_1V, self._keys(place + made, "draft")), logits_1V

    def _chosen(self, logits_1V: Tensor, keys: Keys) -> int:
        if self.sampling.greedy:
            return int(logits_1V.argmax(-1))
        uniform = keys.uniform((1,))[0].double().to(logits_1V.device)
        token, _ = draw(logits_1V, uniform)
        return int(token)

    def _filtered(self, logits_TV: Tensor) -> Tensor:
        return logits_TV if self.sampling.greedy else filtered(logits_TV, self.sampling)

    def _keys(self, place: int, what: str) -> Keys:
        return Keys.of_step(self.sampling.seed, place).fold("speculation").fold(what)

    def _verified(
        self, proposed: list[int], draft_NV: list[Tensor], logits_TV: Tensor, place: int
    ) -> tuple[list[int], int]:
        """The proposals that are kept, and one further token of the model's own."""
        if self.sampling.greedy:
            own = logits_TV.argmax(-1).tolist()
            kept = next((n for n, token in enumerate(proposed) if token != own[n]), len(proposed))
            return proposed[:kept], own[kept]
        for number, token in enumerate(proposed):
            p_V, q_V = logits_TV[number].softmax(-1), draft_NV[number][0].softmax(-1)
            uniform = float(self._keys(place + number, "accept").uniform((1,)))
            if uniform * float(q_V[token]) >= float(p_V[token]):
                # What the model would say more often than the draft does, in proportion.
                rest_V = (p_V - q_V).clamp(min=0)
                return proposed[:number], self._chosen(rest_V.log()[None], self._keys(place + number, "instead"))
        return proposed, self._chosen(logits_TV[-1:], self._keys(place + len(proposed), "further"))
