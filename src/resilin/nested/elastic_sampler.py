"""Which layers, experts and choices a step of elastic pre-training computes: three independent coins (ERNIE 5.0, 2026).

    depth      with probability 0.25 a smaller number of layers
    width      with probability 0.2 routing among some of the experts only
    sparsity   with probability 0.2 fewer experts to a token

A draw is a `Budget`, a function of step-wide keys and of the model's settings: all workers draw the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from resilin.config import Settings
from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.budgets import Budget, BudgetError, Sizes

Probability = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Depth(Settings):
    """Which layers are left out of a step."""

    probability: Probability = 0.25
    """Of a step with fewer layers (the paper's text; its ablation has 0.2)."""
    least: PositiveInt = 1
    """The smallest number of layers; each number from here to one less than all is as likely as the others."""
    plan: Literal["uniform", "prefix", "fixed"] = "uniform"
    """uniform: any layers, but those of `keep` always. prefix: the first ones. fixed: one of `plans`."""
    keep: tuple[int, ...] = (0, -1)
    """Of plan "uniform": layers that are never left out; -1 is the last one."""
    plans: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] = ()
    """Of plan "fixed": the layers that are computed, one list for each plan."""

    @model_validator(mode="after")
    def _check(self) -> Depth:
        if (self.plan == "fixed") != bool(self.plans):
            raise ValueError(
                f"plan is {self.plan!r} and plans {[list(one) for one in self.plans]}: give plans with "
                "plan = 'fixed', and only then"
            )
        if not all(self.plans):
            raise ValueError("plans has an empty list: a step computes at least one layer")
        return self


class Width(Settings):
    """Which experts are left out of a step."""

    probability: Probability = 0.2
    """Of a step that routes among some of the experts."""
    experts: tuple[PositiveInt | Share, ...] = (0.5,)
    """How many: shares of a layer's experts, or numbers; each as likely as the others."""
    shared: bool = False
    """Whether all layers have the same ones; else each layer draws its own."""

    @model_validator(mode="after")
    def _check(self) -> Width:
        if not self.experts:
            raise ValueError("experts is empty: give shares such as 0.5, or numbers of experts")
        return self


class Sparsity(Settings):
    """How many experts a token visits in a step."""

    probability: Probability = 0.2
    """Of a step with fewer of them."""
    least: PositiveInt = 1
    """The smallest number; each from here to one less than usual is as likely as the others."""


def _chosen(keys: Keys, count: int, of: int) -> tuple[int, ...]:
    """`count` of the numbers below `of`, ascending; every choice is as likely."""
    places = keys.uniform((of,))[0].argsort(stable=True)[:count]
    return tuple(sorted(places.tolist()))


def _coin(keys: Keys, probability: float) -> bool:
    return float(keys.fold("coin").uniform((1,))) < probability


def _same(values: Sequence[int | None]) -> Sizes:
    """One number where all layers that have one agree, else one for each."""
    known = {value for value in values if value is not None}
    return known.pop() if len(known) == 1 else tuple(values)


@dataclass(frozen=True, slots=True)
class ElasticSampler:
    """The three axes together.

    Attributes:
        depth: of layers.
        width: of experts.
        sparsity: of choices.
    """

    depth: Depth = field(default_factory=Depth)
    width: Width = field(default_factory=Width)
    sparsity: Sparsity = field(default_factory=Sparsity)

    @property
    def full_probability(self) -> float:
        """Of a step that computes the whole model."""
        return (1 - self.depth.probability) * (1 - self.width.probability) * (1 - self.sparsity.probability)

    def kept_always(self, layers: int) -> tuple[int, ...]:
        """Layers that plan "uniform" never leaves out, of so many."""
        return tuple(sorted({layer + layers if layer < 0 else layer for layer in self.depth.keep}))

    def check(self, settings: DecoderSettings) -> None:
        """Refuse axes that a model does not have, or ranges in which there is nothing to draw.

        Raises:
            BudgetError: naming the setting and what would do.
        """
        if self.depth.probability:
            self._check_depth(settings.layers)
        if settings.moe is None and (self.width.probability or self.sparsity.probability):
            raise BudgetError(
                "objective.width and objective.sparsity are about experts, and the model has none: set model.moe, or "
                "both probabilities to 0"
            )
        for layer in self._mixtures(settings):
            moe = settings.at(layer).moe
            assert moe is not None
            if self.width.probability:
                for size in self.width.experts:
                    self.count(size, moe.experts, layer)
            if self.sparsity.probability and self.sparsity.least >= moe.experts_per_token:
                raise BudgetError(
                    f"objective.sparsity.least is {self.sparsity.least}, and a token visits {moe.experts_per_token} "
                    f"experts of layer {layer}: nothing lies between: use a smaller number, or probability = 0"
                )

    def _check_depth(self, layers: int) -> None:
        depth, kept = self.depth, self.kept_always(layers)
        if depth.plan == "fixed":
            beyond = [layer for plan in depth.plans for layer in plan if layer >= layers]
            if beyond:
                raise BudgetError(f"objective.depth.plans name layer {beyond[0]}; the model has 0 to {layers - 1}")
            return
        if depth.plan == "uniform" and (kept and (kept[0] < 0 or kept[-1] >= layers)):
            raise BudgetError(f"objective.depth.keep is {list(depth.keep)}; the model has layers 0 to {layers - 1}")
        if self.fewest(layers) >= layers:
            raise BudgetError(
                f"objective.depth leaves at least {self.fewest(layers)} of {layers} layers (least "
                f"{depth.least}, keep {list(depth.keep)}): lower them, or set probability = 0"
            )

    def fewest(self, layers: int) -> int:
        """The smallest number of layers that "uniform" and "prefix" draw."""
        return max(self.depth.least, len(self.kept_always(layers)) if self.depth.plan == "uniform" else 1)

    @staticmethod
    def _mixtures(settings: DecoderSettings) -> tuple[int, ...]:
        return tuple(layer for layer in range(settings.layers) if settings.is_moe_layer(layer))

    @staticmethod
    def count(size: float, experts: int, layer: int) -> int:
        """How many experts a size is."""
        exact = size * experts if isinstance(size, float) else float(size)
        count = round(exact)
        if abs(exact - count) > 1e-6 or not 0 < count < experts:
            raise BudgetError(
                f"objective.width.experts has {size:g}, which is {exact:g} of the {experts} experts of layer {layer}: "
                f"expected a whole number from 1 to {experts - 1}"
            )
        return count

    def layers(self, keys: Keys, layers: int) -> tuple[int, ...]:
        """The layers of a step with fewer of them."""
        if self.depth.plan == "fixed":
            return self.depth.plans[keys.integer(len(self.depth.plans))]
        fewest = self.fewest(layers)
        count = fewest + keys.fold("count").integer(layers - fewest)
        if self.depth.plan == "prefix":
            return tuple(range(count))
        always = self.kept_always(layers)
        others = [layer for layer in range(layers) if layer not in always]
        more = _chosen(keys.fold("which"), count - len(always), len(others))
        return tuple(sorted((*always, *(others[place] for place in more))))

    def experts(self, keys: Keys, settings: DecoderSettings) -> tuple[tuple[int, ...] | None, ...]:
        """The experts of each layer in a step with fewer of them; None: the layer has none."""
        size = self.width.experts[keys.fold("size").integer(len(self.width.experts))]
        found: list[tuple[int, ...] | None] = []
        for layer in range(settings.layers):
            moe = settings.at(layer).moe if settings.is_moe_layer(layer) else None
            if moe is None:
                found.append(None)
                continue
            own = keys.fold("which") if self.width.shared else keys.fold("which").fold(layer)
            found.append(_chosen(own, self.count(size, moe.experts, layer), moe.experts))
        return tuple(found)

    def draw(self, settings: DecoderSettings, keys: Keys) -> Budget:
        """What a step computes.

        Args:
            settings: of the model, which `check` has let pass.
            keys: step-wide ones.
        """
        skip: tuple[int, ...] = ()
        experts: tuple[tuple[int, ...] | None, ...] | None = None
        top_k: Sizes = None
        if _coin(keys.fold("depth"), self.depth.probability):
            kept = self.layers(keys.fold("depth"), settings.layers)
            skip = tuple(layer for layer in range(settings.layers) if layer not in kept)
        if _coin(keys.fold("width"), self.width.probability):
            experts = self.experts(keys.fold("width"), settings)
        if _coin(keys.fold("sparsity"), self.sparsity.probability):
            assert settings.moe is not None
            usual = min(settings.at(layer).moe.experts_per_token for layer in self._mixtures(settings))  # type: ignore[union-attr]
            least = self.sparsity.least
            count = least + keys.fold("sparsity").integer(usual - least)
            each = [None if one is None else min(count, len(one)) for one in experts] if experts else [count]
            top_k = _same(each)
        return Budget(skip=skip, experts=experts, top_k=top_k)


def spread(layers: int, count: int) -> tuple[int, ...]:
    """`count` of some layers at even distances, the first and the last among them; of one, the first."""
    places = torch.linspace(0, layers - 1, count).round().int().tolist() if count > 1 else [0]
    return tuple(places)


def left_out(layers: int, kept: Sequence[int]) -> tuple[int, ...]:
    """The other layers, as a budget's `skip`."""
    return tuple(layer for layer in range(layers) if layer not in kept)
