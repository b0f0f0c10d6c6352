"""The model a policy is held against: as it was before the first step.

Shapes: R rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from resilin.adapt.switch import before_training
from resilin.models.digest import weights_digest
from resilin.objective.next_token import IGNORE
from resilin.posttrain.reference_cache import ReferenceCache, content_keys
from resilin.posttrain.sequences import frozen_logprobs, sums_of_rows

ReferenceKind = Literal["cached", "live", "adapters_off"]


class LiveReference:
    """A frozen copy of the policy as it was, or the policy itself with the adapters off that are trained.

    Args:
        make: builds the copy; it is made when first asked for.
        off_adapters: take the policy without the adapters that are trained instead of a copy.
    """

    def __init__(self, make: Callable[[], nn.Module], *, off_adapters: bool = False) -> None:
        self.make, self._off_adapters = make, off_adapters
        self.model: nn.Module | None = None

    @torch.no_grad()
    def token_logprobs(
        self, policy: nn.Module, tokens_RT: Tensor, labels_RT: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """(N,) of every label, row after row."""
        if self._off_adapters:
            training = policy.training
            policy.eval()
            try:
                with before_training(policy):
                    return frozen_logprobs(policy, tokens_RT, labels_RT, temperature)
            finally:
                policy.train(training)
        if self.model is None:
            made = self.make()
            self.model = getattr(made, "policy", made)  # of a policy and its value model only the policy is held
        return frozen_logprobs(self.model, tokens_RT, labels_RT, temperature)

    @torch.no_grad()
    def row_logprobs(self, policy: nn.Module, tokens_RT: Tensor, labels_RT: Tensor) -> Tensor:
        """(R,) float64: the sum over each row's labels."""
        logprobs_N = self.token_logprobs(policy, tokens_RT, labels_RT)
        return sums_of_rows(logprobs_N, (labels_RT != IGNORE).sum(1).tolist())

    def release(self) -> None:
        """Free the copy's memory; it is made again when asked for."""
        self.model = None


class CachedReference:
    """Row sums of a reference, each computed once and kept on disk.

    Args:
        live: computes what is not known.
        path: the file; None: memory only.
        data: digest of the data set.
        identify: name the file by the weights' digest, for a file that several runs share. A run's own file needs no
            such name: a run's settings decide its reference.
    """

    def __init__(self, live: LiveReference, path: Path | None, data: str, *, identify: bool = False) -> None:
        self.live = live
        model = ""
        if identify:
            live.model = live.make()
            model = weights_digest(live.model)
        self.cache = ReferenceCache(path, data, model)
        if len(self.cache):
            live.release()

    def row_logprobs(self, policy: nn.Module, tokens_RT: Tensor, labels_RT: Tensor, rows_R: Tensor) -> Tensor:
        """(R,) float64: the sum over each row's labels."""
        keys_R = content_keys(tokens_RT, labels_RT)
        values_R, known_R = self.cache.find(keys_R)
        missing = (~known_R).nonzero()[:, 0]
        if not len(missing):
            return values_R
        found = self.live.row_logprobs(policy, tokens_RT[missing], labels_RT[missing])
        self.cache.add(keys_R[missing], found, rows_R[missing.to(rows_R.device)])
        values_R[missing] = found
        return values_R

    def keep(self) -> None:
        """Write what is new, and free the model."""
        self.cache.save()
        self.live.release()
