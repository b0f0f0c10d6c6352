"""Draft and verify inside one model: a small budget proposes tokens, a larger one checks them all at once.

Both share one cache of keys and values (MatFormer, section 4.2): the draft reads what the verifier stored of the text,
and what the draft stored of its proposals is overwritten when they are verified. See `resilin.inference.speculative`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from resilin.inference.sampling import GREEDY, Sampling
from resilin.inference.scoring import evaluating
from resilin.inference.speculative import Choose, Speculation
from resilin.models.cache import KVCache
from resilin.models.decoder import Decoder
from resilin.nested.budgets import Budget
from resilin.nested.in_place import budget


class PartDraft:
    """A `Draft`: a part of the model itself.

    Args:
        model: in which it is run.
        part: the budget that proposes.
    """

    def __init__(self, model: Decoder, part: Budget) -> None:
        self._model, self._part = model, part
        self._cache: KVCache | None = None

    def begin(self, cache: KVCache) -> None:
        """The text's keys and values."""
        self._cache = cache

    def heard(self, tokens: Sequence[int], hidden_TD: Tensor) -> None:
        """They are in the cache."""

    def propose(self, pending: int, count: int, choose: Choose) -> tuple[list[int], list[Tensor]]:
        """As of `Draft`; the cache is left as it was."""
        cache, tokens, drawn_from = self._cache, [pending], []
        assert cache is not None
        with evaluating(self._model), budget(self._model, self._part):
            for made in range(count):
                read = torch.tensor([tokens[-1:]], device=cache.length_B.device)
                logits_1V = self._model.logits(self._model(read, cache=cache).hidden_BTD[0])
                token, logits_1V = choose(logits_1V, made)
                tokens.append(token)
                drawn_from.append(logits_1V)
        cache.take_back(count)
        return tokens[1:], drawn_from


def speculate(
    model: Decoder,
    prompt: Sequence[int],
    draft: Budget,
    max_new_tokens: int = 256,
    verifier: Budget | None = None,
    ahead: int = 4,
    sampling: Sampling = GREEDY,
    stop_ids: frozenset[int] = frozenset(),
) -> Speculation:
    """A text that one budget of a model drafts and another verifies; iterate over it for the new tokens.

    Args:
        model: in which both budgets are run.
        prompt: token ids, at least one.
        draft: the budget that proposes.
        max_new_tokens: the most tokens that are added.
        verifier: the budget whose text it is; None: all of the model.
        ahead: tokens that are proposed at a time.
        sampling: how tokens are chosen.
        stop_ids: tokens that end the text; they are given too.

    Raises:
        SpeculationError: see `resilin.inference.speculative.Speculation`.
        BudgetError: a budget does not fit the model.
    """
    verifying = partial(budget, model, verifier if verifier is not None else Budget())
    return Speculation(
        model, prompt, PartDraft(model, draft), max_new_tokens, ahead, sampling, stop_ids, verifying=verifying
    )
