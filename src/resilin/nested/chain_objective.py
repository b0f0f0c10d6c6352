"""Training a decoder of chains at its full scale, or at all of its scales at once (Chain-of-Model, 2025).

[model.chains]
sizes = [2, 2, 4]

[objective]
use = "resilin.nested.chain_objective:ChainLosses"

The first chains of a hidden state are what those chains alone compute, so one forward pass gives the states of every
scale; each scale's loss costs its product with the output matrix and nothing else.

Shapes: B batch, T tokens, D width of a scale, V vocabulary.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.config import component
from resilin.keys import Keys
from resilin.models.chain_modules import ChainEmbedding, ChainHead, matrix_of
from resilin.models.chain_settings import reach_of
from resilin.models.decoder import DecoderOutput
from resilin.nested.budgets import BudgetError
from resilin.nested.checked import CheckedLoss
from resilin.nested.in_place import decoder_in
from resilin.nested.listening import Listening
from resilin.nouns import Batch, Log, Loss, Mean
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings

NonNegativeFloat = Annotated[float, Field(ge=0)]


class ChainLosses(ObjectiveSettings):
    """Any objective, learned by the last scale of a decoder of chains or by all of them."""

    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    """What each scale learns."""
    loss: Literal["multi", "last"] = "multi"
    """multi: the losses of all scales, added up with `weights`; with `model.chains.trained = "head"` this teaches the
    output matrix alone to read every scale (the paper's elastic inference). last: that of the full scale (the paper's
    pre-training), which leaves the first chains of little use by themselves."""
    weights: tuple[NonNegativeFloat, ...] = ()
    """Of the scales in `multi`, the smallest first; empty: 1 each."""
    evaluate_all: bool = True
    """Whether held-out data is read at all scales (`loss_at_1`, `loss_at_2`, ...) and not at the full one alone."""

    @model_validator(mode="after")
    def _check(self) -> ChainLosses:
        if self.weights and self.loss == "last":
            raise ValueError("weights are for loss = 'multi': loss 'last' computes the full scale alone")
        if self.weights and not sum(self.weights):
            raise ValueError("weights are all 0: some scale has to be trained")
        return self

    def build(self, context: ObjectiveContext | None = None) -> ChainLoss:
        """The objective."""
        return ChainLoss(self, self.objective.build(context))


class _AtScale(Listening):
    """A decoder of chains that has computed a batch already, seen at one of its scales; what is asked of it besides is
    answered by the decoder.
    """

    def __init__(self, model: nn.Module, table: ChainEmbedding | ChainHead, hidden_BTD: Tensor) -> None:
        super().__init__(model)
        self.table = (table,)  # not a module of this one
        self.hidden_BTD = hidden_BTD

    def forward(self, *arguments: Any, **named: Any) -> DecoderOutput:
        """The states of the scale, whatever is asked: it is the batch that was computed."""
        return DecoderOutput(self.hidden_BTD)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the output matrix of the scale."""
        return matrix_of(self.table[0], self.hidden_BTD.shape[-1])


class ChainLoss(CheckedLoss):
    """The objective of `ChainLosses`; logs `loss_at_<chains>` of every scale that was computed.

    The gradient of a scale's loss with respect to parameters of later chains is exactly zero.
    """

    def __init__(self, settings: ChainLosses, inner: Any) -> None:
        super().__init__(inner)
        self.chain_losses = settings

    def check(self, model: nn.Module) -> tuple[int, ...]:
        """The width of each scale of a model.

        Raises:
            BudgetError: it has no chains, or not as many as there are weights.
        """
        settings = decoder_in(model).settings
        if settings.chains is None:
            raise BudgetError("losses of chains are for decoders of chains: set model.chains.sizes")
        count, weights = len(settings.chains.sizes), self.chain_losses.weights
        if weights and len(weights) != count:
            raise BudgetError(f"weights has {len(weights)} entries for {count} chains: give one for each scale")
        return reach_of(settings.widths.hidden)

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The weighted sum; without keys (evaluation) the loss of the full scale, with the others' in the logs."""
        reach = self.check(model)
        several = self.chain_losses.evaluate_all if keys is None else self.chain_losses.loss == "multi"
        if not several:
            whole = self.inner(model, batch, keys)
            return Loss(whole.sum, whole.units, {**whole.logs, **_log(len(reach), whole)})
        weights = self.chain_losses.weights or (1.0,) * len(reach)
        listening = Listening(model)
        whole = self.inner(listening, batch, keys)
        hidden_BTD = listening.hidden("scales can be read off one another", "set loss = 'last', evaluate_all = false")
        if hidden_BTD.shape[-1] != reach[-1]:
            raise BudgetError(
                "losses of several scales were asked for inside a budget of fewer chains: leave that budget, or set "
                "loss = 'last'"
            )
        decoder = decoder_in(model)
        table: Any = decoder.embed if decoder.head is None else decoder.head
        logs: dict[str, Log] = dict(whole.logs)
        total = whole.sum if keys is None else weights[-1] * whole.sum
        for chains, width in enumerate(reach[:-1], 1):
            loss = self.inner(_AtScale(model, table, hidden_BTD[..., :width]), batch, keys)
            logs |= _log(chains, loss)
            if keys is not None and weights[chains - 1]:
                total = total + weights[chains - 1] * loss.sum
        return Loss(total, whole.units, {**logs, **_log(len(reach), whole)})


def _log(chains: int, loss: Loss) -> dict[str, Log]:
    return {f"loss_at_{chains}": Mean(loss.sum.detach(), loss.units)}


def chain_losses_in(objective: object) -> ChainLosses | None:
    """The losses of chains among an objective's settings, where they may be wrapped by other transforms."""
    while isinstance(objective, ObjectiveSettings):
        if isinstance(objective, ChainLosses):
            return objective
        objective = getattr(objective, "objective", None)
    return None
