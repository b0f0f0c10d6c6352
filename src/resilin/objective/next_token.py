"""Next-token prediction: the loss of a decoder language model.

Shapes: B samples, T tokens, N valid tokens of all samples, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.keys import Keys
from resilin.nouns import Batch, Log, Loss, Mean, State
from resilin.objective.cross_entropy import (
    CrossEntropyTerms,
    TokenSums,
    chunked_cross_entropy,
    whole_cross_entropy,
)
from resilin.objective.router_loss import Total, micro_batch_load_balance, router_z, sequence_load_balance
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings
from resilin.objective.vocabulary import shard_of

IGNORE = -100
"""The label of positions that are not predicted."""


class NextToken(ObjectiveSettings):
    """Cross-entropy of the next token, with the usual regularisers."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """s: the target becomes (1 - s) * one-hot + s / V."""
    z_loss: float = Field(default=0.0, ge=0)
    """z: adds z * (log Z)^2 per token; 1e-4 in PaLM and in Wortsman et al. (2023)."""
    chunk: int | None = Field(default=None, ge=0)
    """Tokens whose logits exist at once; left out: chosen by vocabulary and device; 0: all of them, which is slower
    and larger, but admits gradients of gradients."""
    load_balance: float = Field(default=0.01, ge=0)
    """Mixtures of experts: weight of the router's imbalance."""
    load_balance_over: Literal["sequence", "micro_batch"] = "sequence"
    """sequence: each sequence by itself (1 when balanced), the same for any micro-batch size; micro_batch: all tokens
    at once as `transformers` does (experts_per_token when balanced), which depends on the micro-batch size."""
    router_z_loss: float = Field(default=0.001, ge=0)
    """Mixtures of experts: weight of the mean squared logsumexp of the router's logits."""

    def build(self, context: ObjectiveContext | None = None) -> NextTokenLoss:
        """The loss."""
        return NextTokenLoss(self)


def valid_labels(batch: Batch) -> Tensor:
    """Which positions are predicted, (B, T) bool: label not -100, weight not 0."""
    valid_BT = batch["labels"] != IGNORE
    weights_BT = batch.get("weights")
    return valid_BT if weights_BT is None else valid_BT & (weights_BT != 0)


def states_of(output: Any) -> Tensor:
    """What a model gave for each token: its last hidden state (B, T, D), or logits (B, T, V) themselves."""
    states: Tensor = output if isinstance(output, Tensor) else output.hidden_BTD
    return states


def softcap_of(model: Any) -> float | None:
    """The soft-cap of a model's output logits, or None."""
    cap: float | None = getattr(getattr(model, "settings", None), "logit_softcap", None)
    return cap


def valid_tokens(fields: tuple[Tensor | None, ...], valid_BT: Tensor) -> tuple[Tensor | None, ...]:
    """The rows (N, ...) of (B, T, ...) tensors that are valid; masked positions cost nothing from there on."""
    index_N = valid_BT.flatten().nonzero()[:, 0]
    flat = [None if field is None else field.flatten(0, 1) for field in fields]
    if len(index_N) == valid_BT.numel():
        return tuple(flat)
    return tuple(None if field is None else field.index_select(0, index_N) for field in flat)


class NextTokenLoss:
    """The loss summed over valid tokens: those whose label is not -100 (and whose weight is not 0).

    The batch holds `tokens` (B, T), `labels` (B, T) and optionally `positions`, `documents` (-1 marks padding) and
    `weights` (B, T), each token's share in the loss. The model is called as `model(tokens, positions, documents,
    keys=keys)` and gives either an output with `hidden_BTD` (and `router_logits`) beside `model.head_weight` (V, D),
    or logits (B, T, V) themselves. A model with a true attribute `leaves_out_unasked` is told as `asked_BT` which
    positions the loss reads, and may leave out others.

    Units are the number of valid tokens, or the sum of their weights, so a weight of 0 is the same as a label of
    -100. Router losses are means over a sequence; each counts as many units as its sequence has.

    Attributes:
        by_token: whether some tokens of rows give, with the model alone, their own part of the sum: rows may then be
            divided over ranks.
    """

    by_token = True

    def __init__(self, settings: NextToken):
        self.settings = settings

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss sum, its units, and the logs `nll`, `accuracy`, `log_z`, `z_loss` and those of routers."""
        more: dict[str, Any] = {}
        if getattr(model, "leaves_out_unasked", False):  # padding, and what follows a document's last label
            more["asked_BT"] = valid_labels(batch)
        output = model(batch["tokens"], batch.get("positions"), batch.get("documents"), keys=keys, **more)
        return self.loss_of(model, output, batch)

    def loss_of(self, model: nn.Module, output: Any, batch: Batch) -> Loss:
        """The loss of an output that the model has given for this batch."""
        weights_BT, valid_BT = batch.get("weights"), valid_labels(batch)
        sums, further = self._sums(model, output, batch, valid_BT)
        tokens = valid_BT.sum()
        units_B = (valid_BT if weights_BT is None else weights_BT * valid_BT).double().sum(1)
        logs: dict[str, Log] = {
            "nll": Mean(sums.nll, tokens),
            "accuracy": Mean(sums.hits, tokens),
            "log_z": Mean(sums.log_z, tokens),
        }
        if self.settings.z_loss:
            logs["z_loss"] = Mean(sums.z_loss, tokens)
        logs |= {name: Mean(value, tokens) for name, value in further.items()}
        loss = sums.loss
        routers = getattr(output, "router_logits", ())
        if routers:
            usual: int = cast(Any, model).settings.moe.experts_per_token
            choices = getattr(output, "choices", ()) or (usual,) * len(routers)
            loss = loss + self._router_losses(model, routers, choices, batch.get("documents"), units_B, logs)
        return Loss(loss, units_B.sum(), logs)

    def _sums(self, model: Any, output: Any, batch: Batch, valid_BT: Tensor) -> tuple[TokenSums, dict[str, Tensor]]:
        """The sums over valid tokens, and those of further logged quantities by name."""
        terms = CrossEntropyTerms(self.settings.label_smoothing, self.settings.z_loss)
        states, labels_N, weights_N = valid_tokens((states_of(output), batch["labels"], batch.get("weights")), valid_BT)
        assert states is not None
        assert labels_N is not None
        if isinstance(output, Tensor):
            return whole_cross_entropy(states, labels_N, weights_N, terms), {}
        if self.settings.chunk == 0:
            return whole_cross_entropy(model.logits(states), labels_N, weights_N, terms), {}
        terms = CrossEntropyTerms(terms.smoothing, terms.z_loss, softcap_of(model))
        chunk, shard = self.settings.chunk, shard_of(model)
        return chunked_cross_entropy(states, model.head_weight, labels_N, weights_N, terms, chunk, shard), {}

    def _router_losses(
        self,
        model: nn.Module,
        routers: tuple[Tensor, ...],
        choices: tuple[int, ...],
        documents_BT: Tensor | None,
        units_B: Tensor,
        logs: dict[str, Log],
    ) -> Tensor:
        real_BT = None if documents_BT is None else documents_BT >= 0
        part = getattr(model, "sequence", None)  # where rows are divided over ranks, routers are judged by whole rows
        total: Total = part.total if part is not None else torch.clone
        units = units_B.sum()
        units_B = total(units_B)
        if self.settings.load_balance_over == "sequence":
            balance = (sequence_load_balance(routers, choices, real_BT, total) * units_B).sum()
        else:
            balance = micro_batch_load_balance(routers, choices, real_BT, total) * units_B.sum()
        squared = (router_z(routers, real_BT, total) * units_B).sum()
        logs["load_balance"] = Mean(balance.detach(), units)
        logs["router_z"] = Mean(squared.detach(), units)
        return self.settings.load_balance * balance + self.settings.router_z_loss * squared

    def state_dict(self) -> State:
        """Nothing: the loss has no state."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing to take back."""
