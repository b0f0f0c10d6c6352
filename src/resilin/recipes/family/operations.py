"""Operations that a run's training takes, with the earlier runs that it starts from.

Counted as everywhere (`resilin.models.flops`): a step's forward passes at the sizes it computes, and twice as much for
each backward pass. Frozen parts of a model that learns count as if they learned. What is drawn is drawn as the run
draws it, but for targets that each sample draws for itself: those have their expected cost. Ranking, calibration and
held-out data are not counted.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from resilin.models.chain_settings import reach_of
from resilin.models.settings import ModelContext
from resilin.nested.budgets import Budget
from resilin.nested.chain_objective import chain_losses_in
from resilin.nested.cost import cost
from resilin.nested.elastic import NemotronElastic, moment
from resilin.nested.elastic_model import Elastic, ElasticModel
from resilin.nested.elastic_pretraining import elastic_in
from resilin.nested.in_place import decoder_in
from resilin.nested.objective import nested_in
from resilin.nested.shortcut import shortcut_in
from resilin.recipes.flexolmo.owners import JoinedRouter
from resilin.recipes.stage import Stage
from resilin.run.settings import RunSettings


def row_length(source: Any) -> int:
    """Tokens of a row of a source, all of whose parts have rows as long."""
    parts = getattr(source, "parts", ())
    found: int = source.sequence_length if not parts else row_length(parts[0].source)
    return found


def _steps(settings: RunSettings, model: nn.Module) -> float:
    """Operations for one token of every step of a run, added up."""
    decoder, steps, objective = decoder_in(model).settings, settings.train.steps, settings.objective
    length = row_length(settings.source)

    @cache
    def at(wanted: Budget) -> float:
        return cost(decoder, wanted, sequence_length=length).flops

    whole = at(Budget())
    if (nested := nested_in(objective)) is not None:
        losses = nested.build()
        sizes = losses.budgets(decoder_in(model))
        return sum(3 * at(sizes[losses.drawn_at(settings.seed, step)]) for step in range(steps))
    if (elastic := elastic_in(objective)) is not None:
        drawing = elastic.build()
        return sum(3 * at(drawing.drawn_at(settings.seed, step, decoder)) for step in range(steps))
    if (shortcut := shortcut_in(objective)) is not None and shortcut.shortens:
        brief = shortcut.build()
        drawn = (brief.drawn_at(settings.seed, step, len(decoder.trajectory)) for step in range(steps))
        return sum(3 * (whole + at(Budget(loops=loops))) for loops in drawn)
    if (chains := chain_losses_in(objective)) is not None and chains.loss == "multi":
        heads = sum(2 * width * decoder.vocab_size for width in reach_of(decoder.widths.hidden)[:-1])
        return steps * 3 * (whole + heads)
    if isinstance(objective, NemotronElastic) and isinstance(model, ElasticModel):
        each = [at(model.budget_of(number)) for number in range(len(model.elastic.targets))]
        return sum(_elastic_step(objective, each, step, steps) for step in range(steps))
    return steps * 3 * whole


def _elastic_step(objective: NemotronElastic, each: list[float], step: int, steps: int) -> float:
    """Of one token: under masks the whole is computed, of slices what they are; a frozen teacher reads along."""
    now, whole = moment(objective, step, steps, len(each)), each[-1]
    computed = [whole] * len(each) if now.learns else each
    expected = sum(weight * one for weight, one in zip(now.weights, computed, strict=True)) / sum(now.weights)
    return 3 * expected + (0 if objective.teacher == "none" else whole)


def operations(settings: RunSettings, model: nn.Module) -> float:
    """Operations of a run and of the earlier runs it starts from.

    Args:
        settings: of the run.
        model: as it was trained.
    """
    total = settings.train.batch_size * row_length(settings.source) * _steps(settings, model)
    for stage in _earlier(settings):
        earlier = stage.settings(settings.seed)
        total += operations(earlier, stage.build(ModelContext(settings.seed)))
    return total


def _earlier(settings: RunSettings) -> list[Stage]:
    """The runs that a run starts from; that of the public model, from which owners' runs start, counts once."""
    model = settings.model
    if isinstance(model, Elastic) and isinstance(model.model, Stage):
        return [model.model]
    if isinstance(model, JoinedRouter):
        return [model.team.base, *map(model.team.expert, model.team.domains)]
    return [model] if isinstance(model, Stage) else []
