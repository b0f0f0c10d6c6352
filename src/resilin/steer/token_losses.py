"""The loss of every sample of a batch, in one pass.

Shapes: B samples, T tokens, N = B * T, C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resilin.nouns import Batch, Objective
from resilin.objective.cross_entropy import chunk_rows
from resilin.objective.next_token import NextTokenLoss, valid_labels
from resilin.objective.vocabulary import vocabulary_of


def innermost(objective: Objective) -> Objective:
    """What transforms of an objective are wrapped around."""
    found: Any = objective
    while "inner" in vars(found):
        found = found.inner
    return found  # type: ignore[no-any-return]


def predicts_tokens(objective: Objective) -> bool:
    """Whether a sample's loss is the mean cross-entropy of its next tokens, which is computed for all at once."""
    return isinstance(innermost(objective), NextTokenLoss)


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch of tokens, without dropout."""
    return model(batch["tokens"], batch.get("positions"), batch.get("documents"), keys=None)


def hidden_states(output: Any) -> Tensor | None:
    """(B, T, D) of a decoder's output; None for a model that gives logits."""
    return None if isinstance(output, Tensor) else output.hidden_BTD


@torch.no_grad()
def token_losses(model: Any, batch: Batch, output: Any = None) -> Tensor:
    """The cross-entropy of every token, (B, T) float32; 0 where none is predicted. No graph.

    Args:
        model: a decoder (`logits` of hidden states), or any module that gives logits (B, T, V).
        batch: `tokens`, `labels` and what else language batches have, on the model's device.
        output: of the model for this batch, where it is there already.
    """
    output = call(model, batch) if output is None else output
    hidden_BTD = hidden_states(output)
    whole = hidden_BTD is None
    states: Tensor = (output if hidden_BTD is None else hidden_BTD).flatten(0, 1)
    labels_N, valid_N = batch["labels"].flatten(), valid_labels(batch).flatten()
    losses_N = torch.zeros(len(labels_N), dtype=torch.float32, device=labels_N.device)
    index_N = valid_N.nonzero()[:, 0]
    vocabulary = states.shape[-1] if whole else vocabulary_of(model)
    for index_C in index_N.split(chunk_rows(vocabulary, states.device.type)):
        logits_CV = states[index_C] if whole else model.logits(states[index_C])
        losses_N[index_C] = nn.functional.cross_entropy(logits_CV.float(), labels_N[index_C], reduction="none")
    return losses_N.view(batch["labels"].shape)


def mean_losses(losses_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """The mean over each sample's valid tokens, (B,); 0 for a sample that has none."""
    return losses_BT.sum(1) / valid_BT.sum(1).clamp(min=1)


@torch.no_grad()
def sample_losses(model: nn.Module, objective: Objective, batch: Batch) -> Tensor:
    """The loss per unit of each sample, (B,) float32.

    Next-token losses are the plain cross-entropy, all samples in one pass; any other objective is asked sample by
    sample.
    """
    if predicts_tokens(objective):
        return mean_losses(token_losses(model, batch), valid_labels(batch))
    return torch.stack(_one_by_one(model, objective, batch))


def _one_by_one(model: nn.Module, objective: Objective, batch: Batch) -> list[Tensor]:
    found = []
    for row in range(len(batch)):
        loss = innermost(objective)(model, batch.rows(row, row + 1), None)
        found.append((loss.sum / loss.units.clamp(min=1e-12)).float())
    return found
