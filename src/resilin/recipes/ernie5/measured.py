"""Runs of the recipe: trained as ever, then asked what to deploy, and which experts each domain uses.

What is deployed is chosen on the first half of the held-out data (loads of experts, plans of layers) and judged on the
other half, beside the first experts and the other plans.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

from torch import nn

from resilin.data.mix import Mix
from resilin.data.settings import SourceContext
from resilin.nested.budgets import Budget
from resilin.nested.consistency import consistency
from resilin.nested.cost import cost
from resilin.nested.deploy import deployable
from resilin.nested.elastic_pretraining import elastic_in
from resilin.nested.expert_loads import expert_loads, stacked
from resilin.nested.expert_use import normalised_entropy, overlaps
from resilin.nested.in_place import decoder_in
from resilin.nested.sub_model import sub_model
from resilin.nouns import Batch, Source
from resilin.run.events import Evaluated, Listener
from resilin.run.folder import RunFolder
from resilin.run.jsonl_log import JsonlLog
from resilin.run.run import Outcome, Run
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

BATCHES = 24


def _batches(source: Source) -> list[Batch]:
    every = (source.fetch(step, range(source.slots(step))) for step in range(len(source)))  # type: ignore[arg-type]
    return list(islice(every, BATCHES))


def measured_choice(model: nn.Module, batches: list[Batch], smallest: Budget) -> dict[str, float]:
    """Losses, on data that nothing was chosen by, of the best and the worst plan of layers with their most used
    experts, and of the best plan with its first experts.
    """
    half = (len(batches) + 1) // 2
    layers = sub_model(decoder_in(model).settings, smallest).layers
    experts, top_k = len(layers[0].experts), layers[0].top_k
    found = deployable(model, batches[:half], layers=len(layers), experts=experts, top_k=top_k)
    first = replace(found[0].wanted, experts=experts)
    read = consistency(model, [found[0].wanted, found[-1].wanted, first], batches[half:])
    names = ("best plan, most used", "worst plan, most used", "best plan, first")
    return {f"deployed/{name}": one.loss for name, one in zip(names, read, strict=True)}


def measured_use(model: nn.Module, domains: dict[str, list[Batch]]) -> dict[str, float]:
    """Normalised entropy of loads by layer, of each domain and all together, and the overlap of each pair's most used
    quarter of the experts.
    """
    counts = {name: stacked(expert_loads(model, batches)) for name, batches in domains.items()}
    every = {**counts, "all": sum(counts.values(), start=next(iter(counts.values())) * 0)}
    facts = {}
    for name, counts_LE in every.items():
        for layer, value in enumerate(normalised_entropy(counts_LE).tolist()):
            facts[f"use/entropy/{name}/{layer}"] = value
    for (one, other), values in overlaps(counts).items():
        for layer, value in enumerate(values.tolist()):
            facts[f"use/overlap/{one}, {other}/{layer}"] = value
    return facts


def domains_of(settings: RunSettings) -> dict[str, list[Batch]]:
    """Held-out data of each part of a mix, by its kind; {} where the source is none."""
    if not isinstance(settings.source, Mix):
        return {}
    found = {}
    for part in settings.source.parts:
        context = SourceContext(seed=settings.seed, split="validation", batch_size=settings.train.batch_size)
        name = str(getattr(part.source, "kind", "library"))
        found[name] = _batches(part.source.build(context))
    return found


def costs(settings: RunSettings, model: nn.Module) -> dict[str, float]:
    """Operations of the whole run, as a multiple of a plain step's, and of each budget that was read."""
    decoder, elastic = decoder_in(model), elastic_in(settings.objective)
    assert elastic is not None
    objective, whole = elastic.build(), cost(decoder.settings, Budget())
    steps = settings.train.steps
    drawn = (objective.drawn_at(settings.seed, step, decoder.settings) for step in range(steps))
    flops = sum(cost(decoder.settings, wanted).flops for wanted in drawn)
    facts = {"cost/flops of the run": flops, "cost/flops": whole.flops, "cost/parameters": float(whole.parameters)}
    for text in elastic.evaluated:
        told = cost(decoder.settings, Budget.parse(text))
        facts |= {f"cost/flops/{text}": told.flops, f"cost/parameters/{text}": float(told.parameters)}
    return facts


def train_measured(settings: RunSettings, path: Path, listeners: tuple[Listener, ...]) -> tuple[Run, Outcome]:
    """The recipe's runner."""
    run, outcome = start_run(settings, path, resume=True, extra_listeners=listeners)
    elastic = elastic_in(settings.objective)
    if outcome.reason != "completed" or elastic is None:
        return run, outcome
    facts = costs(settings, run.model)
    if elastic.evaluated:
        smallest = Budget.parse(elastic.evaluated[-1])
        facts |= measured_choice(run.model, _batches(run.validation["validation"]), smallest)
        if domains := domains_of(settings):
            facts |= measured_use(run.model, domains)
    with JsonlLog(RunFolder(path).events_file) as log:
        log(Evaluated(step=settings.train.steps, name="measured", metrics=facts))
    return run, outcome
