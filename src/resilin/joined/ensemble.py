"""Ensembles of models that were trained apart (branch-train-merge, Li et al., 2022): baselines of joining.

Each model's say follows from how well it reads the prompt: w = softmax over models of log p(prompt). Probabilities are
mixed, sum of w_m p_m(y | x); the same w may average parameters instead (`resilin.joined.averaging`).

Shapes: M models, B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resilin.inference.scoring import evaluating
from resilin.joined.errors import JoinError
from resilin.models.decoder import Decoder
from resilin.nouns import Batch
from resilin.objective.next_token import IGNORE


def label_logprobs(model: Decoder, batch: Batch) -> Tensor:
    """(B, T) float32: the log-probability of each label; 0 where there is none."""
    labels_BT = batch["labels"]
    with evaluating(model):
        output = model(batch["tokens"], batch.get("positions"), batch.get("documents"))
        logprobs_BTV = model.logits(output.hidden_BTD).log_softmax(-1)
        found = logprobs_BTV.gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
        return torch.where(labels_BT == IGNORE, 0.0, found).clone()


def prompt_weights(prompt_MB: Tensor, top_k: int | None = None) -> Tensor:
    """(M, B): each model's weight for each row.

    Args:
        prompt_MB: log-probabilities of whole prompts.
        top_k: only so many models, those with the largest weights, which are made to sum to 1 again; None: all.

    Raises:
        JoinError: there are fewer models.
    """
    weights_MB = prompt_MB.double().softmax(0)
    if top_k is not None:
        if not 0 < top_k <= len(prompt_MB):
            raise JoinError(f"top_k is {top_k}, and there are {len(prompt_MB)} models")
        kept_MB = torch.zeros_like(weights_MB).scatter(0, weights_MB.topk(top_k, 0).indices, 1.0)
        weights_MB = weights_MB * kept_MB
        weights_MB = weights_MB / weights_MB.sum(0)
    return weights_MB


def mixed_logprobs(logprobs_MBT: Tensor, weights_MB: Tensor) -> Tensor:
    """(B, T): log of the weighted mean of probabilities."""
    return torch.logsumexp(logprobs_MBT.double() + weights_MB.log()[..., None], 0)
