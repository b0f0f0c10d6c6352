"""Text from a decoder of chains whose scale changes from token to token, without reading anything anew.

With shared keys (CoLM-Air) the cache is what the first chain makes, whoever makes it: a prompt is read by the first
chain alone, and each token after it by as many chains as are wanted. With keys of their own, chains can be left out on
the way but not taken in again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
class ChainText:
    """A text that grows; iterate over it for the new tokens.

    Args:
        model: a decoder of chains.
        prompt: token ids, at least one.
        scale: how many chains choose the n-th new token (from 0): a number, or a function of n, which may look at the
            tokens so far.
        max_new_tokens: the most tokens that are added; the model's positions may end it before.
        prompt_chains: chains that read the prompt but its last token; None: the first alone with shared keys, else as
            many as choose the first token.
        sampling: temperature, top-k, top-p and min-p; a repetition penalty is refused.
        stop_ids: tokens that end the text; they are given too.
        seed: of the draws.

    Raises:
        BudgetError: the model has no chains, or not so many.
    """

    model: Decoder
    prompt: Sequence[int]
    scale: int | Callable[[int], int]
    max_new_tokens: int = 256
    prompt_chains: int | None = None
    sampling: Sampling = GREEDY
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0

    def __post_init__(self) -> None:
        check_prompts(self.model, [self.prompt])
        if self.model.settings.chains is None:
            raise BudgetError("scales can be changed in decoders of chains, and this one has none (no model.chains)")
        if self.sampling.repetition_penalty != 1.0:
            raise BudgetError("a repetition penalty is not computed here: set it to 1")

    def __iter__(self) -> Iterator[int]:
        left = min(self.max_new_tokens, self.model.settings.max_positions - len(self.prompt))
        device = self.model.embed.weight.device
        cache = KVCache.of(self.model, 1, len(self.prompt) + max(left, 0))
        pending, before = int(self.prompt[-1]), list(self.prompt[:-1])
        if before and left > 0:
            first = 1 if self.model.settings.shares_keys else self._chains(0)
            self._read(torch.tensor([before], device=device), cache, self.prompt_chains or first)
        for number in range(left):
            logits_1V = self._read(torch.tensor([[pending]], device=device), cache, self._chains(number))
            pending = self._chosen(logits_1V, number)
            yield pending
            if pending in self.stop_ids:
                return

    def _chains(self, number: int) -> int:
        return self.scale if isinstance(self.scale, int) else self.scale(number)

    def _read(self, tokens_1T: Tensor, cache: KVCache, chains: int) -> Tensor:
        """(1, V): the logits of a scale after the last token; all tokens are now in the cache."""
        with evaluating(self.model), budget(self.model, Budget(chains=chains)):
            logits_1V: Tensor = self.model.logits(self.model(tokens_1T, cache=cache).hidden_BTD[:, -1])
        return logits_1V

    def _chosen(self, logits_1V: Tensor, number: int) -> int:
        if self.sampling.greedy:
            return int(logits_1V.argmax(-1))
        uniform = Keys.of_step(self.seed, number).fold("chain text").uniform((1,))[0].double().to(logits_1V.device)
        token, _ = draw(filtered(logits_1V, self.sampling), uniform)
        return int(token)
