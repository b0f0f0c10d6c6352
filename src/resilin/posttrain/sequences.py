"""A model's last hidden states where labels are, for sequences that end at different places.

Shapes: R rows (sequences), T positions, N labelled positions of all rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.objective.next_token import IGNORE
from resilin.objective.vocabulary import shard_of
from resilin.posttrain.joined_rows import JoinedRows, join_rows
from resilin.posttrain.logprob_loss import (
    Head,
    Score,
    chunked_label_logprobs,
    chunked_logprob_loss,
    label_logprobs,
    whole_logprob_loss,
)

_WORTH_A_CALL = 0.1  # share of all positions that a second call of the model must save
_POSITIONS_AT_ONCE = {"cpu": 2**13, "cuda": 2**16}  # of a call without gradients
_FEW_POSITIONS = {"cpu": 128, "cuda": 16384}  # below this many a call costs more than it saves


@dataclass(frozen=True, slots=True)
class LabelStates:
    """What the model says at the labelled positions, row after row.

    Attributes:
        states_ND: hidden states, or (N, V) logits of a model that gives logits.
        labels_N: int64.
        counts: how many of the N belong to each row.
        head: what makes hidden states into logits; None: they are logits.
        temperature: of the distribution.
    """

    states_ND: Tensor
    labels_N: Tensor
    counts: list[int]
    head: Head | None
    temperature: float

    def loss(self, groups: Sequence[int], score: Score, chunk: int | None) -> Tensor:
        """`score` summed over groups of tokens (see `resilin.posttrain.logprob_loss`).

        Args:
            groups: tokens of each group, in the order of the rows.
            score: what a part costs.
            chunk: tokens whose logits exist at once; None: chosen; 0: all, differentiable any number of times.
        """
        if self.head is None:
            return whole_logprob_loss(self.states_ND / self.temperature, self.labels_N, groups, score)
        if chunk == 0:
            return whole_logprob_loss(self.head.logits(self.states_ND), self.labels_N, groups, score)
        return chunked_logprob_loss(self.states_ND, self.head, self.labels_N, groups, score, chunk)

    def logprobs(self, chunk: int | None = None) -> Tensor:
        """(N,) log-probabilities without gradients."""
        if self.head is None:
            return label_logprobs(self.states_ND.detach() / self.temperature, self.labels_N)
        return chunked_label_logprobs(self.states_ND, self.head, self.labels_N, chunk or None)


def split_by_length(widths: Sequence[int], few: int) -> list[list[int]]:
    """Rows in groups of similar length, so that less padding is computed; one group where that saves too little.

    Args:
        widths: of each row.
        few: a group of fewer positions is never split.
    """
    order = sorted(range(len(widths)), key=lambda row: -widths[row])

    def split(rows: list[int]) -> list[list[int]]:
        whole = len(rows) * widths[rows[0]]
        if whole <= few or len(rows) < 2:
            return [rows]
        costs = [at * widths[rows[0]] + (len(rows) - at) * widths[rows[at]] for at in range(1, len(rows))]
        best = min(range(len(costs)), key=costs.__getitem__)
        if costs[best] > (1 - _WORTH_A_CALL) * whole:
            return [rows]
        return split(rows[: best + 1]) + split(rows[best + 1 :])

    return [sorted(rows) for rows in split(order)] if order else []


def head_of(model: Any, temperature: float) -> Head:
    """The output matrix of a decoder, its soft-cap, and the temperature of what is asked of it."""
    softcap = getattr(getattr(model, "settings", None), "logit_softcap", None)
    shard, weight_VD = shard_of(model), model.head_weight
    return Head(weight_VD if shard is None else shard.rows_of(weight_VD), softcap, temperature, shard)


def joins_rows(model: nn.Module, keys: Keys | None) -> bool:
    """Whether rows may go through a model as one: a decoder that attends document by document, and draws nothing."""
    return isinstance(model, Decoder) and model.attends_by_document and (keys is None or not model.draws)


def joined_states(decoder: nn.Module, joined: JoinedRows) -> Tensor:
    """(N, D): the hidden state of every place."""
    tokens_1N, positions_1N, documents_1N, continues_1N, _ = joined
    output = decoder(tokens_1N, positions_1N, documents_1N, continues_BT=continues_1N)
    hidden_1ND: Tensor = output.hidden_BTD
    return hidden_1ND[0]


def label_states(
    model: nn.Module, tokens_RT: Tensor, labels_RT: Tensor, keys: Keys | None = None, temperature: float = 1.0
) -> LabelStates:
    """Run the model over right-padded rows, none further than its last label.

    Positions after a row's last label decide nothing in a causal model. A decoder that attends document by document
    computes none of them, and what neighbouring rows begin with in common (a prompt) once. Elsewhere they are cut off
    where the rows allow it, and rows of very different lengths go through the model in several calls. The result does
    not depend on any of this.

    Args:
        model: called as `model(tokens, positions, documents, keys=keys)`.
        tokens_RT: ids; anything after a row's last label.
        labels_RT: -100 where nothing is asked.
        keys: of the rows, for the model's own randomness.
        temperature: divides the logits.
    """
    valid_RT = labels_RT != IGNORE
    place_T = torch.arange(1, labels_RT.shape[1] + 1, device=labels_RT.device)
    host = torch.stack((valid_RT.sum(1), (valid_RT * place_T).amax(1)))  # one transfer for both
    counts, widths = host.tolist()
    if any(widths) and joins_rows(model, keys):
        joined = join_rows(tokens_RT, widths)
        states_ND = joined_states(model, joined).index_select(0, joined.place_RT[valid_RT])
        return LabelStates(states_ND, labels_RT[valid_RT], counts, head_of(model, temperature), temperature)
    few = _FEW_POSITIONS.get(tokens_RT.device.type, _FEW_POSITIONS["cuda"])
    asked = [row for row in range(len(widths)) if widths[row]] or [0]
    parts = [[asked[i] for i in part] for part in split_by_length([max(widths[row], 1) for row in asked], few)]
    found, order = [], []
    gives_logits = False
    for rows in parts:
        width = max(max(widths[row] for row in rows), 1)
        index = torch.tensor(rows, device=tokens_RT.device)
        all_rows = len(rows) == len(tokens_RT)
        tokens = tokens_RT[:, :width] if all_rows else tokens_RT[index, :width]
        of_rows = keys
        if keys is not None and not all_rows:
            of_rows = replace(keys, slots_B=keys.slots_B[torch.tensor(rows)])
        output = model(tokens, None, None, keys=of_rows)
        gives_logits = isinstance(output, Tensor)
        states_RTD = output if gives_logits else output.hidden_BTD
        valid = valid_RT[:, :width] if all_rows else valid_RT[index, :width]
        found.append(states_RTD.flatten(0, 1).index_select(0, valid.flatten().nonzero()[:, 0]))
        order += rows
    states_ND = found[0] if len(found) == 1 else _in_order(found, order, counts)
    head = None if gives_logits else head_of(model, temperature)
    return LabelStates(states_ND, labels_RT[valid_RT], counts, head, temperature)


@torch.no_grad()
def frozen_logprobs(model: nn.Module, tokens_RT: Tensor, labels_RT: Tensor, temperature: float = 1.0) -> Tensor:
    """(N,) log-probability of every label, row after row, without gradients and a bounded number of rows at a time."""
    most = _POSITIONS_AT_ONCE.get(tokens_RT.device.type, _POSITIONS_AT_ONCE["cuda"])
    rows = max(1, most // tokens_RT.shape[1])
    found = [
        label_states(model, tokens_RT[at : at + rows], labels_RT[at : at + rows], None, temperature).logprobs()
        for at in range(0, len(tokens_RT), rows)
    ]
    return torch.cat(found)


def _in_order(found: list[Tensor], order: list[int], counts: list[int]) -> Tensor:
    """The states of several calls in the order of the rows."""
    starts, at = {}, 0
    for row in order:
        starts[row] = at
        at += counts[row]
    index = [starts[row] + i for row in sorted(order) for i in range(counts[row])]
    return torch.cat(found).index_select(0, torch.tensor(index, dtype=torch.int64, device=found[0].device))


def sums_of_rows(values_N: Tensor, counts: Sequence[int]) -> Tensor:
    """(R,) float64: the sum of each row's values."""
    device = values_N.device
    rows_N = torch.repeat_interleave(torch.arange(len(counts), device=device), torch.tensor(counts, device=device))
    return torch.zeros(len(counts), dtype=torch.float64, device=device).index_add(0, rows_N, values_N.double())


def spread(values_N: Tensor, labels_RT: Tensor) -> Tensor:
    """(R, T): the values at the labelled positions, zero elsewhere."""
    out_RT = torch.zeros(labels_RT.shape, dtype=values_N.dtype, device=values_N.device)
    out_RT[labels_RT != IGNORE] = values_N
    return out_RT
