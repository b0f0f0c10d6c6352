"""Draft and verify inside one model: a small budget proposes tokens, a larger one checks them all at once.

Both share one cache of keys and values (MatFormer, section 4.2): the draft reads what the verifier stored of the text,
and what the draft stored of its proposals is overwritten when they are verified.

What comes out is the verifier's: with temperature 0 its own greedy text, else samples of its distribution (Leviathan
et al., "Fast inference from transformers via speculative decoding", 2023, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resilin.inference.generate import check_prompts
from resilin.inference.sampling import GREEDY, Sampling, draw, filtered
from resilin.inference.scoring import evaluating
from resilin.keys import Keys
from resilin.models.cache import KVCache
from resilin.models.decoder import Decoder
from resilin.nested.budgets import Budget, BudgetError
from resilin.nested.in_place import budget


@dataclass
class Drafts:
    """What became of the proposals.

    Attributes:
        proposed: tokens that the draft made.
        accepted: of them, how many the verifier kept.
        rounds: passes of the verifier, beside that over the prompt.
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
        model: in which both budgets are run.
        prompt: token ids, at least one.
        draft: the budget that proposes.
        max_new_tokens: the most tokens that are added; the model's positions may end it before.
        verifier: the budget whose text it is.
        ahead: tokens that are proposed at a time.
        sampling: temperature, top-k, top-p and min-p; a repetition penalty is refused.
        stop_ids: tokens that end the text; they are given too.

    Attributes:
        drafts: what became of the proposals so far.
    """

    model: Decoder
    prompt: Sequence[int]
    draft: Budget
    max_new_tokens: int = 256
    verifier: Budget = field(default_factory=Budget)
    ahead: int = 4
    sampling: Sampling = GREEDY
    stop_ids: frozenset[int] = frozenset()
    drafts: Drafts = field(default_factory=Drafts)

    def __post_init__(self) -> None:
        check_prompts(self.model, [self.prompt])
        if self.ahead < 1:
            raise BudgetError(f"ahead is {self.ahead}: at least one token has to be proposed at a time")
        if self.sampling.repetition_penalty != 1.0:
            raise BudgetError("a repetition penalty depends on what is being verified: set it to 1 for speculation")
        if self.model.row_states(1) is not None:
            raise BudgetError(
                "the states of Mamba-2 layers cannot take back tokens that were not kept: generate without a draft"
            )

    def __iter__(self) -> Iterator[int]:
        left = min(self.max_new_tokens, self.model.settings.max_positions - len(self.prompt))
        device = self.model.embed.weight.device
        cache = KVCache.of(self.model, 1, len(self.prompt) + left + self.ahead + 1)
        pending, place = int(self.prompt[-1]), 0
        if len(self.prompt) > 1:
            self._read(torch.tensor([list(self.prompt[:-1])], device=device), cache, self.verifier)
        while left > 0:
            count = min(self.ahead, left - 1)
            proposed, draft_NV = self._propose(pending, count, cache, place)
            kept, last = self._verify(pending, proposed, draft_NV, cache, place)
            cache.take_back(count - len(kept))
            self.drafts.rounds += 1
            self.drafts.proposed += count
            self.drafts.accepted += len(kept)
            for token in (*kept, last):
                yield token
                left -= 1
                if token in self.stop_ids:
                    return
            pending, place = last, place + count + 1

    def _read(self, tokens_1T: Tensor, cache: KVCache, wanted: Budget) -> Tensor:
        """(T, V): the logits after each token, which is now in the cache."""
        with evaluating(self.model), budget(self.model, wanted):
            output = self.model(tokens_1T, cache=cache)
            logits_TV: Tensor = self.model.logits(output.hidden_BTD[0])
        return logits_TV

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

    def _propose(self, pending: int, count: int, cache: KVCache, place: int) -> tuple[list[int], list[Tensor]]:
        """Tokens of the draft and the logits each was drawn from (1, V); the cache is left as it was."""
        token, tokens, drawn_from = pending, [], []
        device = cache.length_B.device
        for number in range(count):
            logits_1V = self._filtered(self._read(torch.tensor([[token]], device=device), cache, self.draft))
            token = self._chosen(logits_1V, self._keys(place + number, "draft"))
            tokens.append(token)
            drawn_from.append(logits_1V)
        cache.take_back(count)
        return tokens, drawn_from

    def _verify(
        self, pending: int, proposed: list[int], draft_NV: list[Tensor], cache: KVCache, place: int
    ) -> tuple[list[int], int]:
        """The proposals that are kept, and one further token of the verifier's own."""
        tokens_1T = torch.tensor([[pending, *proposed]], device=cache.length_B.device)
        logits_TV = self._filtered(self._read(tokens_1T, cache, self.verifier))
        if self.sampling.greedy:
            own = logits_TV.argmax(-1).tolist()
            kept = next((n for n, token in enumerate(proposed) if token != own[n]), len(proposed))
            return proposed[:kept], own[kept]
        for number, token in enumerate(proposed):
            p_V, q_V = logits_TV[number].softmax(-1), draft_NV[number][0].softmax(-1)
            uniform = float(self._keys(place + number, "accept").uniform((1,)))
            if uniform * float(q_V[token]) >= float(p_V[token]):
                # What the verifier would say more often than the draft does, in proportion.
                rest_V = (p_V - q_V).clamp(min=0)
                return proposed[:number], self._chosen(rest_V.log()[None], self._keys(place + number, "instead"))
        return proposed, self._chosen(logits_TV[-1:], self._keys(place + len(proposed), "further"))
