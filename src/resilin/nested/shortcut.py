"""Training a looped decoder at any number of loops: shortcut consistency (LoopFormer, 2026).

[model.loop]
times = 8

[objective]
use = "resilin.nested.shortcut:Shortcut"

Each step computes the batch twice, with all L loops and with a shorter trajectory, a function of (seed, step):

    loss = CE(full) + short_weight * CE(short) + consistency_weight * mean((h_short - stopgrad(h_full))^2)

h is the hidden state after the last norm. Shapes: N valid tokens, D hidden size.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.config import component
from resilin.keys import Keys
from resilin.models.loop_settings import PositiveInt
from resilin.nested.budgets import Budget, BudgetError
from resilin.nested.checked import CheckedLoss
from resilin.nested.in_place import budget, decoder_in, full
from resilin.nested.listening import Listening
from resilin.nested.trajectories import Trajectory, label_of, sequential, uniform
from resilin.nouns import Batch, Log, Loss, Mean
from resilin.objective.cross_entropy import CrossEntropyTerms
from resilin.objective.distillation import DistillationTerms, TeacherStates, chunked_distillation
from resilin.objective.next_token import softcap_of, valid_labels, valid_tokens
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings
from resilin.objective.vocabulary import whole_head


class Shortcut(ObjectiveSettings):
    """Any objective, learned by all loops of a looped decoder and, with smaller weights, by fewer larger ones."""

    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    """What is learned."""
    short_weight: float = Field(default=0.1, ge=0)
    """Of the objective on the short trajectory: lambda_1."""
    consistency_weight: float = Field(default=0.1, ge=0)
    """Of the distance to what all loops give, which the gradient does not reach: lambda_2. With both weights 0 nothing
    short is computed."""
    target: Literal["hidden", "logits"] = "hidden"
    """hidden: mean squared error of the hidden states after the last norm (the paper). logits: KL(all loops || short)
    of the next token, which does not depend on the size of hidden states."""
    sampler: Literal["sequential", "uniform", "fixed"] = "sequential"
    """How short trajectories are drawn. sequential: a number of loops below L, then each step from what is left (the
    published code; early steps are larger on average). uniform: such a number, then any trajectory of it. fixed: one
    of `trajectories`."""
    trajectories: tuple[PositiveInt | tuple[PositiveInt, ...], ...] = ()
    """Of sampler "fixed": numbers of equal loops, or steps such as [4, 1, 1]."""
    evaluated: tuple[PositiveInt | tuple[PositiveInt, ...], ...] | None = None
    """What held-out data is read with besides all loops, as `trajectories`, logged as `loss_at_2`, `loss_at_4+1+1`;
    left out: every smaller number of loops; []: nothing."""

    @model_validator(mode="after")
    def _check(self) -> Shortcut:
        if (self.sampler == "fixed") != bool(self.trajectories):
            raise ValueError(
                f"sampler is {self.sampler!r} and trajectories {list(self.trajectories)}: give trajectories with "
                "sampler = 'fixed', and only then"
            )
        return self

    @property
    def shortens(self) -> bool:
        """Whether short trajectories are computed at all."""
        return bool(self.short_weight or self.consistency_weight)

    def build(self, context: ObjectiveContext | None = None) -> ShortcutLoss:
        """The objective."""
        return ShortcutLoss(self, self.objective.build(context))


def _states(listening: Listening) -> Tensor:
    return listening.hidden("hidden states of short trajectories can be compared", "set consistency_weight = 0")


class ShortcutLoss(CheckedLoss):
    """The objective of `Shortcut`; logs `loss_full`, `loss_short`, `loops`, `consistency` and
    `consistency_relative`, the squared error as a share of the squared states, which a small last norm cannot shrink.
    """

    def __init__(self, settings: Shortcut, inner: Any) -> None:
        super().__init__(inner)
        self.shortcut = settings

    def check(self, model: nn.Module) -> None:
        """Refuse a model that is not looped, or trajectories that do not fit it.

        Raises:
            BudgetError: naming what does not fit.
        """
        settings = decoder_in(model).settings
        if settings.loop is None:
            raise BudgetError("the shortcut objective is for looped decoders: set model.loop.times to 2 or more")
        if self.shortcut.shortens and self.shortcut.sampler != "fixed" and settings.loop.times < 2:
            raise BudgetError("model.loop.times is 1, and no trajectory is shorter: use 2 or more")
        for one in (*self.shortcut.trajectories, *(self.shortcut.evaluated or ())):
            with budget(model, Budget(loops=one)):
                pass

    def drawn_at(self, seed: int, step: int, whole: int) -> int | Trajectory:
        """The short trajectory of a step, the same on every worker.

        Args:
            seed: of the run.
            step: from 0.
            whole: L, the loops of the model; steps are in units of 1/L.
        """
        keys = Keys.of_step(seed, step).fold("shortcut")
        if self.shortcut.sampler == "fixed":
            return self.shortcut.trajectories[keys.integer(len(self.shortcut.trajectories))]
        loops = 1 + keys.integer(whole - 1)
        draw = sequential if self.shortcut.sampler == "sequential" else uniform
        return draw(keys.fold("steps"), loops, whole)

    def _budget(self, model: nn.Module, loops: int | Trajectory) -> Budget:
        loop = decoder_in(model).settings.loop
        told_steps = loop is not None and loop.condition == "time_and_step"
        return Budget(loops=loops if told_steps or isinstance(loops, int) else len(loops))

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The weighted sum; without keys (evaluation) the loss of all loops, with the others' in the logs."""
        if keys is None:
            return self._evaluated(model, batch)
        if not self.shortcut.shortens:
            return self.inner(model, batch, keys)
        self.check(model)
        settings = decoder_in(model).settings
        loops = self.drawn_at(keys.seed, keys.step, len(settings.trajectory))
        whole, short = Listening(model), Listening(model)
        with full(model):
            long = self.inner(whole, batch, keys)
        with budget(model, self._budget(model, loops)):
            brief = self.inner(short, batch, keys)
        count = loops if isinstance(loops, int) else len(loops)
        logs: dict[str, Log] = {
            **long.logs,
            "loss_full": Mean(long.sum.detach(), long.units),
            "loss_short": Mean(brief.sum.detach(), brief.units),
            "loops": Mean(count * long.units, long.units),
        }
        total = long.sum
        if self.shortcut.short_weight:
            total = total + self.shortcut.short_weight * brief.sum
        if self.shortcut.consistency_weight:
            distance = self._distance(model, batch, _states(short), _states(whole).detach(), logs)
            logs["consistency"] = Mean(distance.detach(), long.units)
            total = total + self.shortcut.consistency_weight * distance
        return Loss(total, long.units, logs)

    def _distance(
        self, model: nn.Module, batch: Batch, short_BTD: Tensor, full_BTD: Tensor, logs: dict[str, Log]
    ) -> Tensor:
        """The distance of the two runs, summed over valid tokens with their weights."""
        fields = (short_BTD, full_BTD, batch["labels"], batch.get("weights"))
        short_ND, full_ND, labels_N, weights_N = valid_tokens(fields, valid_labels(batch))
        assert short_ND is not None
        assert full_ND is not None
        assert labels_N is not None
        wide = torch.promote_types(short_ND.dtype, torch.float32)
        error_N = (short_ND.to(wide) - full_ND.to(wide)).square().mean(-1)
        size_N = full_ND.to(wide).square().mean(-1)
        logs["consistency_relative"] = Mean(error_N.detach().double().sum(), size_N.double().sum())
        if self.shortcut.target == "hidden":
            return (error_N if weights_N is None else error_N * weights_N).double().sum()
        head, cap = whole_head(model, "objective.target = 'logits'"), softcap_of(model)
        only_kl = DistillationTerms(0.0, 1.0, 1.0, "forward")
        teacher = TeacherStates(full_ND, head.detach(), cap)
        plain = CrossEntropyTerms(softcap=cap)
        return chunked_distillation(short_ND, head, labels_N, weights_N, teacher, plain, only_kl)[0].loss

    def _evaluated(self, model: nn.Module, batch: Batch) -> Loss:
        whole = self.inner(model, batch, None)
        times = len(decoder_in(model).settings.trajectory)
        chosen = range(1, times) if self.shortcut.evaluated is None else self.shortcut.evaluated
        logs: dict[str, Log] = dict(whole.logs)
        for loops in chosen:
            with budget(model, self._budget(model, loops)):
                loss = self.inner(model, batch, None)
            logs[f"loss_at_{label_of(loops)}"] = Mean(loss.sum, loss.units)
        return Loss(whole.sum, whole.units, {**logs, f"loss_at_{times}": Mean(whole.sum, whole.units)})


def shortcut_in(objective: object) -> Shortcut | None:
    """The shortcut objective among an objective's settings, where it may be wrapped by other transforms."""
    while isinstance(objective, ObjectiveSettings):
        if isinstance(objective, Shortcut):
            return objective
        objective = getattr(objective, "objective", None)
    return None
