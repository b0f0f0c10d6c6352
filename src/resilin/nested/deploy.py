"""Choosing what to deploy of an elastic mixture of experts: the most used experts, and the layers that do best.

Steps of elastic pre-training draw random subsets, which makes no particular small one good. So experts are ranked by
their load on some text, and several plans of layers are read on it (ERNIE 5.0, 2026, leaves both open).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from math import comb

from torch import nn

from resilin.keys import Keys
from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.budgets import Budget, BudgetError
from resilin.nested.consistency import Consistency, consistency
from resilin.nested.elastic_sampler import left_out, spread
from resilin.nested.expert_loads import expert_loads
from resilin.nested.expert_use import by_load
from resilin.nested.in_place import decoder_in
from resilin.nouns import Batch


@dataclass(frozen=True, slots=True)
class Deployable:
    """A sub-model that could be deployed.

    Attributes:
        wanted: its budget.
        quality: on the text that was read.
    """

    wanted: Budget
    quality: Consistency


def layer_plans(layers: int, count: int, most: int = 16) -> list[tuple[int, ...]]:
    """Which `count` of some layers may be kept: all choices that keep the first and the last one, or, where these are
    more than `most`, evenly spread ones, the first ones, and others drawn at random, always the same.

    Raises:
        BudgetError: there are not so many layers.
    """
    if not 1 <= count <= layers:
        raise BudgetError(f"{count} of {layers} layers: expected 1 to {layers}")
    if count == 1:
        return [(layer,) for layer in range(min(layers, most))]
    if comb(layers - 2, count - 2) + 1 <= most:
        plans = [(0, *inner, layers - 1) for inner in combinations(range(1, layers - 1), count - 2)]
        return list(dict.fromkeys([*plans, tuple(range(count))]))
    found = dict.fromkeys([spread(layers, count), tuple(range(count))])
    for number in range(64 * most):
        if len(found) >= most:
            break
        places = Keys.of_step(0, number).fold("layer plans").uniform((layers - 2,))[0].argsort(stable=True)
        found[(0, *sorted(1 + place for place in places[: count - 2].tolist()), layers - 1)] = None
    return list(islice(found, most))


def _wanted(settings: DecoderSettings, layers: int | None, experts: int | None, top_k: int | None) -> int:
    if settings.moe is None and (experts is not None or top_k is not None):
        raise BudgetError("the model has no experts: leave experts and top_k out")
    return settings.layers if layers is None else layers


def deployable(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    layers: int | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    plans: Sequence[Sequence[int]] | None = None,
    most: int = 16,
) -> list[Deployable]:
    """Sub-models of a size, by rising loss on some text.

    Args:
        model: with a decoder.
        batches: of text with labels, neither trained on nor judged by afterwards.
        layers: how many to keep; None: all.
        experts: how many of each layer, those with the largest load when the plan's layers read the text; None: all.
        top_k: of them a token visits; None: as many as usual, or all that are left.
        plans: layers to keep, one list for each plan; None: those of `layer_plans`.
        most: plans that are read where `plans` is None.

    Raises:
        BudgetError: the model has not so many, or no batches are given.
    """
    settings = decoder_in(model).settings
    count = _wanted(settings, layers, experts, top_k)
    if not batches:
        raise BudgetError("no text was given to choose by: give some that the model was not trained on")
    if plans is not None and layers is not None and any(len(set(plan)) != layers for plan in plans):
        raise BudgetError(f"plans have to keep {layers} layers each: {[list(plan) for plan in plans]}")
    chosen = []
    for plan in layer_plans(settings.layers, count, most) if plans is None else plans:
        wanted = Budget(skip=left_out(settings.layers, plan))
        if experts is not None:
            wanted = replace(wanted, experts=by_load(expert_loads(model, batches, wanted), experts).experts)
        if top_k is not None:
            wanted = replace(wanted, top_k=top_k)
        chosen.append(wanted)
    read = consistency(model, chosen, batches)
    pairs = [Deployable(wanted, quality) for wanted, quality in zip(chosen, read, strict=True)]
    return sorted(pairs, key=lambda one: one.quality.loss)
