"""Training a nested model: which sizes a step computes, and what their losses come to.

MatFormer (Devvrit et al., 2023), and what it is compared with: joint training, and a size for each layer.

[objective]
use = "resilin.nested.objective:Nested"
granularities = [0.125, 0.25, 0.5, 1]

The size of a step is a function of (seed, step), so that all micro-batches and workers agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from resilin.config import component
from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.budgets import Budget, BudgetError
from resilin.nested.granularities import Granularity, Target, budget_at, check_granularities, ffn_size, label_of
from resilin.nested.in_place import budget, decoder_in
from resilin.nouns import Batch, Log, Loss, Mean, StepView, keeps_weights
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings
from resilin.transforms import ObjectiveTransform

Mode = Literal["sample", "joint-sum", "joint-mean", "per-layer"]


class Nested(ObjectiveSettings):
    """Any objective, computed at several sizes of one decoder, each the leading part of the next."""

    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    """What each size learns."""
    granularities: tuple[Granularity, ...] = (0.125, 0.25, 0.5, 1)
    """The sizes, ascending: shares of each layer, the last of them 1, or numbers of neurons, the last of them all.
    `[1]` is ordinary training."""
    targets: tuple[Target, ...] = ("ffn",)
    """What is cut: neurons of the feed-forward, query heads (in whole groups where they come out even), or both."""
    mode: Mode = "sample"
    """sample: each step computes one size, drawn with `probabilities` (the paper). joint-sum: each step computes all
    sizes on the same batch, and their gradients are added up, without a mean (the published code); joint-mean: their
    mean. per-layer: each step draws a size for each layer by itself (Once-for-All)."""
    probabilities: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Of the sizes in `sample` and `per-layer`, in any proportion; empty: all alike. More weight on the largest buys
    its quality cheaply."""
    evaluate_all: bool = True
    """Whether held-out data is read at all sizes (`loss_at_0.25`, ...) and not by the whole model alone; a pipeline
    reads it by the whole model."""

    @model_validator(mode="after")
    def _check(self) -> Nested:
        check_granularities(self.granularities)
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets is {list(self.targets)}: expected 'ffn', 'heads' or both")
        if "heads" in self.targets and self.granularities[-1] > 1:
            raise ValueError("granularities are numbers of neurons, which heads cannot follow: give shares such as 0.5")
        if self.probabilities:
            if len(self.probabilities) != len(self.granularities):
                raise ValueError(
                    f"probabilities has {len(self.probabilities)} entries for {len(self.granularities)} granularities"
                )
            if not sum(self.probabilities):
                raise ValueError("probabilities are all 0: some size has to be trained")
            if self.mode.startswith("joint"):
                raise ValueError(
                    f"mode {self.mode!r} computes all sizes: probabilities are for 'sample' and 'per-layer'"
                )
        return self

    def build(self, context: ObjectiveContext | None = None) -> NestedLoss:
        """The objective."""
        return NestedLoss(self, self.objective.build(context))


def whole_is_last(settings: DecoderSettings, granularities: Sequence[Granularity]) -> None:
    """Refuse sizes in neurons that do not end with all of them.

    Raises:
        BudgetError: naming the layer.
    """
    if granularities[-1] > 1:
        for layer in range(settings.layers):
            size = ffn_size(settings, layer)
            if granularities[-1] != size:
                raise BudgetError(
                    f"granularities end with {granularities[-1]}, and layer {layer} has {size} neurons: the last one "
                    f"is the whole model, {size}"
                )


class NestedLoss(ObjectiveTransform):
    """The objective of `Nested`; logs `loss_at_<size>` of each size that was computed by itself.

    Gradients of what a step's sizes leave out are exactly zero. Momentum and weight decay of AdamW move those weights
    all the same, as in the published code.
    """

    def __init__(self, settings: Nested, inner: Any) -> None:
        super().__init__(inner)
        self.nest = settings
        self._known: tuple[DecoderSettings, tuple[Budget, ...]] | None = None

    def budgets(self, model: nn.Module) -> tuple[Budget, ...]:
        """The trained sizes of a model, ascending; the last is all of it.

        Raises:
            BudgetError: they do not fit the model.
        """
        settings = decoder_in(model).settings
        if self._known is None or self._known[0] is not settings:
            whole_is_last(settings, self.nest.granularities)
            made = [budget_at(settings, one, self.nest.targets) for one in self.nest.granularities[:-1]]
            self._known = settings, (*made, Budget())
        return self._known[1]

    @keeps_weights
    def before_step(self, view: StepView) -> None:
        """Refuses sizes that do not fit, before anything is computed."""
        super().before_step(view)
        self.budgets(view.model)

    def drawn(self, keys: Keys) -> int:
        """Which size (its number) is drawn from step-wide keys."""
        weights = self.nest.probabilities or (1.0,) * len(self.nest.granularities)
        target, total = float(keys.uniform((1,))) * sum(weights), 0.0
        for number, weight in enumerate(weights):
            total += weight
            if target < total:
                return number
        return max(number for number, weight in enumerate(weights) if weight)

    def drawn_at(self, seed: int, step: int) -> int:
        """The size (its number) that `sample` computes in a step."""
        return self.drawn(Keys.of_step(seed, step).fold("nest"))

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss of this step's sizes; without keys (evaluation) of the whole model, with the others' in the logs."""
        mode = self.nest.mode
        if len(self.nest.granularities) == 1:
            return self.inner(model, batch, keys)
        if keys is None:
            return self._evaluated(model, batch)
        if mode == "per-layer":
            return self._per_layer(model, batch, keys)
        if mode == "sample":
            number = self.drawn_at(keys.seed, keys.step)
            loss = self._at(model, batch, keys, number)
            return Loss(loss.sum, loss.units, {**loss.logs, **self._log(number, loss)})
        return self._joint(model, batch, keys)

    def _at(self, model: nn.Module, batch: Batch, keys: Keys | None, number: int) -> Loss:
        with budget(model, self.budgets(model)[number]):
            return self.inner(model, batch, keys)

    def _log(self, number: int, loss: Loss) -> dict[str, Log]:
        mean = Mean(loss.sum.detach(), loss.units)
        return {f"loss_at_{label_of(self.nest.granularities[number])}": mean}

    def _joint(self, model: nn.Module, batch: Batch, keys: Keys) -> Loss:
        count = len(self.nest.granularities)
        losses = [self._at(model, batch, keys, number) for number in range(count)]
        total = losses[0].sum
        for loss in losses[1:]:
            total = total + loss.sum
        logs: dict[str, Log] = dict(losses[-1].logs)
        for number, loss in enumerate(losses):
            logs |= self._log(number, loss)
        return Loss(total / count if self.nest.mode == "joint-mean" else total, losses[-1].units, logs)

    def _per_layer(self, model: nn.Module, batch: Batch, keys: Keys) -> Loss:
        settings, step = decoder_in(model).settings, Keys.of_step(keys.seed, keys.step).fold("nest")
        numbers = [self.drawn(step.fold(layer)) for layer in range(settings.layers)]
        self.budgets(model)
        sizes = [self.nest.granularities[number] for number in numbers]
        with budget(model, budget_at(settings, sizes, self.nest.targets)):
            return self.inner(model, batch, keys)

    def _evaluated(self, model: nn.Module, batch: Batch) -> Loss:
        whole = self.inner(model, batch, None)
        if not self.nest.evaluate_all or decoder_in(model).span is not None:
            return whole  # a stage of a pipeline computes a batch once
        logs: dict[str, Log] = dict(whole.logs)
        for number in range(len(self.nest.granularities) - 1):
            logs |= self._log(number, self._at(model, batch, None, number))
        return Loss(whole.sum, whole.units, {**logs, **self._log(len(self.nest.granularities) - 1, whole)})


def nested_in(objective: object) -> Nested | None:
    """The nesting among an objective's settings, where it may be wrapped by other transforms."""
    while isinstance(objective, ObjectiveSettings):
        if isinstance(objective, Nested):
            return objective
        objective = getattr(objective, "objective", None)
    return None
