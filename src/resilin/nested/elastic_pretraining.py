"""Elastic pre-training: one run of a mixture of experts that may afterwards have fewer layers, experts and choices.

ERNIE 5.0 (2026), "once for all" training. Each step flips three coins (`resilin.nested.elastic_sampler`) and computes
the loss of the part of the model that they name: no distillation, no further term, nothing rescaled.

[objective]
use = "resilin.nested.elastic_pretraining:ElasticPretraining"
depth.probability = 0.25
width = { probability = 0.2, experts = [0.5] }
sparsity.probability = 0.2
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator
from torch import nn

from resilin.config import component
from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.budgets import Budget
from resilin.nested.checked import CheckedLoss
from resilin.nested.elastic_sampler import Depth, ElasticSampler, Sparsity, Width
from resilin.nested.in_place import budget, decoder_in
from resilin.nested.sub_model import sub_model
from resilin.nouns import Batch, Log, Loss, Mean
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings


class ElasticPretraining(ObjectiveSettings):
    """Any objective, computed at a part of a mixture of experts that changes from step to step."""

    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    """What is learned."""
    depth: Depth = Depth()
    """Steps with fewer layers."""
    width: Width = Width()
    """Steps with fewer experts."""
    sparsity: Sparsity = Sparsity()
    """Steps with fewer experts to a token. With all three probabilities 0 this is ordinary training, bit for bit."""
    evaluated: tuple[str, ...] = ()
    """Budgets that held-out data is read with besides the whole model, as commands take them:
    "top_k=2", "experts=8,skip=1+2"; logged as `loss_at_top_k=2`."""

    @field_validator("evaluated")
    @classmethod
    def _budgets(cls, evaluated: tuple[str, ...]) -> tuple[str, ...]:
        for text in evaluated:
            if "=" not in text:
                raise ValueError(f"evaluated has {text!r}: expected budgets such as 'top_k=2' or 'experts=8,skip=1+2'")
            Budget.parse(text)
        return evaluated

    @property
    def sampler(self) -> ElasticSampler:
        """The three axes."""
        return ElasticSampler(self.depth, self.width, self.sparsity)

    def build(self, context: ObjectiveContext | None = None) -> ElasticLoss:
        """The objective."""
        return ElasticLoss(self, self.objective.build(context))


class ElasticLoss(CheckedLoss):
    """The objective of `ElasticPretraining`; logs `layers`, `experts` and `top_k` of the step, the latter two as means
    over its layers.

    Gradients of layers, experts and rows of routers that a step leaves out are exactly zero (or None). Momentum and
    weight decay of AdamW move those weights all the same.
    """

    def __init__(self, settings: ElasticPretraining, inner: Any) -> None:
        super().__init__(inner)
        self.elastic = settings
        self.sampler = settings.sampler
        self._checked: DecoderSettings | None = None

    def check(self, model: nn.Module) -> None:
        """Refuse what does not fit a model.

        Raises:
            BudgetError: naming it.
        """
        settings = decoder_in(model).settings
        if self._checked is settings:
            return
        self.sampler.check(settings)
        for text in self.elastic.evaluated:
            sub_model(settings, Budget.parse(text))
        self._checked = settings

    def drawn_at(self, seed: int, step: int, settings: DecoderSettings) -> Budget:
        """What a step computes: the same for all its micro-batches and workers."""
        return self.sampler.draw(settings, Keys.of_step(seed, step).fold("elastic pre-training"))

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss of this step's part; without keys (evaluation) of the whole model, with the others' in the logs."""
        if keys is None:
            return self._evaluated(model, batch)
        if self.sampler.full_probability == 1:
            return self.inner(model, batch, keys)
        self.check(model)
        settings = decoder_in(model).settings
        wanted = self.drawn_at(keys.seed, keys.step, settings)
        with budget(model, wanted):
            loss = self.inner(model, batch, keys)
        return Loss(loss.sum, loss.units, {**loss.logs, **_sizes(settings, wanted, loss)})

    def _evaluated(self, model: nn.Module, batch: Batch) -> Loss:
        whole = self.inner(model, batch, None)
        if not self.elastic.evaluated or decoder_in(model).span is not None:
            return whole  # a stage of a pipeline computes a batch once
        logs: dict[str, Log] = dict(whole.logs)
        for text in self.elastic.evaluated:
            with budget(model, Budget.parse(text)):
                loss = self.inner(model, batch, None)
            logs[f"loss_at_{text}"] = Mean(loss.sum.detach(), loss.units)
        return Loss(whole.sum, whole.units, logs)


def _sizes(settings: DecoderSettings, wanted: Budget, loss: Loss) -> dict[str, Log]:
    """What a step computed, as logs whose mean over micro-batches is itself."""
    layers = sub_model(settings, wanted).layers
    mixed = [one for one in layers if one.experts]
    found = {"layers": float(len(layers))}
    if mixed:
        found["experts"] = sum(len(one.experts) for one in mixed) / len(mixed)
        found["top_k"] = sum(one.top_k for one in mixed) / len(mixed)
    return {name: Mean(value * loss.units, loss.units) for name, value in found.items()}


def elastic_in(objective: object) -> ElasticPretraining | None:
    """The elastic pre-training among an objective's settings, where it may be wrapped by other transforms."""
    while isinstance(objective, ObjectiveSettings):
        if isinstance(objective, ElasticPretraining):
            return objective
        objective = getattr(objective, "objective", None)
    return None
