"""Any objective with a weight for each sample, decided by a weighter just before the step.

Source: DataFlex (arXiv:2603.26164), the schedule `dynamic_weight`.

The weights are a function of the whole batch: before the step the model looks at all of it once (no gradients), so
that micro-batches of any size train with the same weights. That look costs about a third of a step.

Shapes: B samples, T tokens.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from resilin.config import component
from resilin.keys import Keys
from resilin.nouns import Batch, Log, Loss, Max, Mean, Objective, State, StepView
from resilin.objective.next_token import valid_labels
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings, needed
from resilin.steer.by_domain import domain_names
from resilin.steer.token_losses import predicts_tokens
from resilin.steer.weighter import StepLook, Weighter, checked_weights
from resilin.transforms import ObjectiveTransform


class Weighted(ObjectiveSettings):
    """A batch's loss becomes sum(w * l) / sum(w) over its samples; l is a sample's loss per unit."""

    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    """Whose loss is weighted."""
    weighter: Annotated[Weighter, component("resilin.steer.loss_weights:LossWeights")] = Field(
        default_factory=dict, validate_default=True
    )
    """Who decides."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps on the plain objective first."""
    reduce: Literal["mean", "sum"] = "mean"
    """mean: divide by the sum of the weights; sum: do not, so that weights which do not sum to 1 change the size of
    the gradient, and with it what a learning rate and a clipping norm mean, with every batch size."""
    look_batch: Annotated[int, Field(ge=1)] = 32
    """Samples computed at once while the batch is looked at."""

    def build(self, context: ObjectiveContext | None = None) -> WeightedLoss:
        """The objective.

        Raises:
            ValueError: without a context.
        """
        return WeightedLoss(self.objective.build(context), self, needed(context, "a weighted objective"))


class WeightedLoss(ObjectiveTransform):
    """Weights of the coming step by slot, and the loss with them. Evaluation is unweighted."""

    def __init__(self, inner: Objective, settings: Weighted, context: ObjectiveContext) -> None:
        super().__init__(inner)
        self.settings, self.context = settings, context
        self._weights: Tensor | None = None
        self._figures: dict[str, float] = {}
        self._memory: State = {}
        self._cache: dict[str, Any] = {}

    def before_step(self, view: StepView) -> None:
        """Look at the whole batch of the step and weigh its samples."""
        super().before_step(view)
        self._weights = None
        if view.step < self.settings.warmup_steps:
            return
        count = view.source.slots(view.step)
        if not count:
            return
        batch = view.source.fetch(view.step, range(count))
        look = StepLook(
            view=view,
            batch=batch,
            objective=self.inner,
            seed=self.context.seed,
            names=domain_names(view.source),
            folder=self.context.folder,
            chunk=self.settings.look_batch,
            memory=self._memory,
            cache=self._cache,
        )
        who = f"weighter {type(self.settings.weighter).__name__}"
        self._weights = checked_weights(self.settings.weighter.weights(look), count, who)
        self._figures = look.figures

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The weighted loss; units are the sum of the weights (or, for `reduce = "sum"`, shares of the batch)."""
        if keys is None or self._weights is None:
            return self.inner(model, batch, keys)
        weights_B = self._weights[batch.slots_B]
        loss = self._weighed(model, batch, keys, weights_B)
        if self.settings.reduce == "sum":
            units = torch.tensor(len(batch) / len(self._weights), dtype=torch.float64, device=loss.sum.device)
            loss = Loss(loss.sum, units, loss.logs)
        logs: dict[str, Log] = dict(loss.logs)
        count = torch.tensor(float(len(batch)))
        logs["weight/mean"] = Mean(weights_B.double().sum(), count)
        logs["weight/max"] = Max(weights_B.max())
        logs |= {name: Mean(value * count.double(), count) for name, value in self._figures.items()}
        return Loss(loss.sum, loss.units, logs)

    def _weighed(self, model: nn.Module, batch: Batch, keys: Keys, weights_B: Tensor) -> Loss:
        """sum(w * loss per unit), with units sum(w)."""
        if predicts_tokens(self.inner):
            given_BT = batch.get("weights")
            own_BT = valid_labels(batch).float() if given_BT is None else valid_labels(batch) * given_BT
            share_BT = own_BT / own_BT.sum(1, keepdim=True).clamp(min=1e-12)
            weights_BT = share_BT * weights_B.to(share_BT.device)[:, None]
            return self.inner(model, Batch(batch.slots_B, {**batch.fields, "weights": weights_BT}), keys)
        total: Tensor | None = None
        logs: dict[str, Log] = {}
        for row, weight in enumerate(weights_B.tolist()):
            one = self.inner(model, batch.rows(row, row + 1), keys.rows(row, row + 1))
            part = weight * one.sum / one.units.clamp(min=1e-12)
            total = part if total is None else total + part
            logs = {k: logs[k].merge(log) if k in logs else log for k, log in one.logs.items()}  # type: ignore[arg-type]
        assert total is not None
        return Loss(total, weights_B.double().sum().to(total.device), logs)

    def own_state(self) -> State:
        """What the weighter remembers."""
        return {"weighter": type(self.settings.weighter).__name__, "memory": self._memory}

    def load_own_state(self, state: State) -> None:
        """Take it back.

        Raises:
            ValueError: it is of another weighter.
        """
        mine = type(self.settings.weighter).__name__
        if state["weighter"] != mine:
            raise ValueError(
                f"the checkpoint holds the state of weighter {state['weighter']}, this run has {mine}: resume with the "
                "settings the run was started with"
            )
        self._memory = state["memory"]
        self._cache.clear()
