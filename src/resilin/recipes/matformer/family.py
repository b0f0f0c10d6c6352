"""Runs of the recipe: trained as ever, then their family measured on the held-out text, as one more evaluation.

Of a model with trained sizes: every rung of Mix'n'Match, the same mixtures the other way round (larger sizes first),
and the smallest size beside the largest. Of a model of one size: itself, beside the whole one that was trained alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated

import torch

from resilin.config import component
from resilin.models.decoder import Decoder
from resilin.models.settings import ModelContext, ModelSettings
from resilin.nested.budgets import Budget
from resilin.nested.consistency import Consistency, consistency
from resilin.nested.cost import cost
from resilin.nested.granularities import budget_at, label_of
from resilin.nested.mix_n_match import ladder
from resilin.nested.objective import Nested, nested_in
from resilin.nouns import Batch
from resilin.objective.next_token import IGNORE, NextToken
from resilin.run.events import Evaluated, Listener
from resilin.run.folder import RunFolder
from resilin.run.jsonl_log import JsonlLog
from resilin.run.run import Outcome, Run
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

BATCHES = 24
"""Held-out batches that a family is measured on."""


class Alone(NextToken):
    """The objective of a model of one size, which is compared with another run's model."""

    whole: Annotated[ModelSettings, component("resilin.recipes.stage:Stage")]
    """The whole model, trained alone on the same data."""


def _batches(run: Run) -> Iterator[Batch]:
    source = run.validation["validation"]
    found = (source.fetch(step, range(source.slots(step))) for step in range(len(source)))  # type: ignore[arg-type]
    return islice(found, BATCHES)


def members(nested: Nested, model: Decoder) -> dict[str, Budget]:
    """What is measured of a model with trained sizes, by name."""
    settings, sizes, targets = model.settings, nested.granularities, nested.targets
    found = dict(ladder(settings, sizes, targets))
    half = settings.layers // 2
    for small, large in pairwise(sizes):
        name = f"{label_of(large)} x{half}, {label_of(small)} x{settings.layers - half}"
        found[f"falling: {name}"] = budget_at(settings, [large] * half + [small] * (settings.layers - half), targets)
    skewed = [sizes[0]] * (settings.layers - half) + [sizes[-1]] * half
    found["skewed"] = budget_at(settings, skewed, targets)
    return found


def _numbers(name: str, one: Consistency, parameters: int) -> dict[str, float]:
    told = {"loss": one.loss, "agreement": one.agreement, "kl": one.kl, "parameters": float(parameters)}
    return {f"{name}/{key}": value for key, value in told.items()}


def measured_family(run: Run, nested: Nested) -> dict[str, float]:
    """Loss, agreement, divergence and non-embedding parameters of every member."""
    assert isinstance(run.model, Decoder)
    wanted = members(nested, run.model)
    facts: dict[str, float] = {}
    for (name, one), told in zip(
        wanted.items(), consistency(run.model, list(wanted.values()), _batches(run)), strict=True
    ):
        facts |= _numbers(name, told, cost(run.model.settings, one).non_embedding)
    return facts


@torch.no_grad()
def measured_alone(run: Run, whole: Decoder) -> dict[str, float]:
    """The same of a model of one size, against another whole model."""
    assert isinstance(run.model, Decoder)
    small, sums, tokens = run.model.eval(), torch.zeros(3, dtype=torch.float64), 0
    for batch in _batches(run):
        valid_BT = batch["labels"] != IGNORE
        labels_N = batch["labels"][valid_BT]
        both = []
        for model in (small, whole.eval()):
            output = model(batch["tokens"], batch.get("positions"), batch.get("documents"))
            both.append(model.logits(output.hidden_BTD[valid_BT]).log_softmax(-1))
        mine_NV, its_NV = both
        agreed = (mine_NV.argmax(-1) == its_NV.argmax(-1)).double().sum()
        kl = (its_NV.exp() * (its_NV - mine_NV)).double().sum()
        sums += torch.stack([-mine_NV.gather(1, labels_N[:, None]).double().sum(), agreed, kl])
        tokens += len(labels_N)
    told = Consistency(tokens, *(sums / max(tokens, 1)).tolist())
    return _numbers("alone", told, cost(small.settings, Budget()).non_embedding)


def train_family(settings: RunSettings, path: Path, listeners: tuple[Listener, ...]) -> tuple[Run, Outcome]:
    """The recipe's runner."""
    run, outcome = start_run(settings, path, resume=True, extra_listeners=listeners)
    nested, objective = nested_in(settings.objective), settings.objective
    if outcome.reason != "completed":
        return run, outcome
    if nested is not None:
        facts = measured_family(run, nested)
    elif isinstance(objective, Alone):
        whole = objective.whole.build(ModelContext(settings.seed, getattr(run.source, "vocab_size", None)))
        assert isinstance(whole, Decoder)
        facts = measured_alone(run, whole)
    else:
        return run, outcome
    with JsonlLog(RunFolder(path).events_file) as log:
        log(Evaluated(step=settings.train.steps, name="family", metrics=facts))
    return run, outcome
