"""Runs of the recipe: the joined router is tuned, and then everything is measured on held-out text of every domain.

Each row's first bytes are its prompt: ensembles and averages choose by it, and only what follows is scored, for all
methods alike.

Shapes: B rows, T tokens, M models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from resilin.data.settings import SourceContext, SourceSettings
from resilin.joined.attribution import attribution
from resilin.joined.averaging import average
from resilin.joined.domain import Domain, document_vectors
from resilin.joined.ensemble import label_logprobs, mixed_logprobs, prompt_weights
from resilin.joined.extraction import extraction_rate
from resilin.joined.training import use_experts
from resilin.models.decoder import Decoder
from resilin.nested.budgets import Budget
from resilin.nested.in_place import budget
from resilin.nouns import Batch
from resilin.objective.next_token import IGNORE
from resilin.recipes.flexolmo.owners import PUBLIC, JoinedRouter, Members, texts_of
from resilin.run.events import Evaluated, Listener
from resilin.run.folder import RunFolder
from resilin.run.jsonl_log import JsonlLog
from resilin.run.run import Outcome, Run
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

BATCHES = 8
"""Held-out batches of each domain."""
PROMPT = 32
"""Bytes of a row that are its prompt."""
EXTRACTED = 12
"""Training rows of each owner that extraction is tried on."""

Score = Callable[[Batch], Tensor]
"""A batch -> (B, T): the log-probability of each label."""


def held_out(source: SourceSettings, seed: int) -> list[Batch]:
    """The batches of a domain that all methods are measured on."""
    built = source.build(SourceContext(seed, "validation", 8))
    count = len(built)  # type: ignore[arg-type]
    found = (built.fetch(step, range(built.slots(step))) for step in range(count))
    return list(islice(found, BATCHES))


def loss_of(score: Score, batches: list[Batch]) -> float:
    """Nats for a byte behind the prompt."""
    total, count = 0.0, 0
    for batch in batches:
        valid_BT = batch["labels"][:, PROMPT:] != IGNORE
        total -= float(score(batch)[:, PROMPT:][valid_BT].double().sum())
        count += int(valid_BT.sum())
    return total / count


def of_model(model: Decoder, wanted: Budget | None = None) -> Score:
    """A model, or a part of it."""

    def score(batch: Batch) -> Tensor:
        with budget(model, wanted or Budget()):
            return label_logprobs(model, batch)

    return score


def of_ensemble(models: list[Decoder], top_k: int | None = None) -> Score:
    """Branch-train-merge: probabilities mixed by how well each model reads the prompt."""

    def score(batch: Batch) -> Tensor:
        logprobs_MBT = torch.stack([label_logprobs(model, batch) for model in models])
        return mixed_logprobs(logprobs_MBT, prompt_weights(logprobs_MBT[..., :PROMPT].sum(-1), top_k))

    return score


def of_weighted_average(models: list[Decoder]) -> Score:
    """The same weights, of parameters: a model for each row."""

    def score(batch: Batch) -> Tensor:
        prompts_MB = torch.stack([label_logprobs(model, batch)[:, :PROMPT].sum(-1) for model in models])
        weights_MB = prompt_weights(prompts_MB)
        rows = []
        for row in range(len(batch)):
            rows.append(label_logprobs(average(models, weights_MB[:, row]), batch.rows(row, row + 1)))
        return torch.cat(rows)

    return score


class PromptRouter:
    """Prompt routing: a classifier of prompts, trained on each domain's training text, chooses one model for a row."""

    def __init__(self, sources: Mapping[str, SourceSettings], models: Mapping[str, Decoder]) -> None:
        """Args:
        sources: of each domain.
        models: of each domain.
        """
        self._models, self._domain = list(models.values()), Domain(kind="ngrams", tokens=PROMPT)
        means = []
        self._tokenizer = next(iter(sources.values())).build(SourceContext(0, "train", 1)).tokenizer  # type: ignore[attr-defined]
        for name in models:
            prompts = [text[:PROMPT] for text in texts_of(sources[name])]
            means.append(document_vectors(self._domain, prompts, None, None, 256).mean(0))
        self._means_MD = torch.stack(means)

    def __call__(self, batch: Batch) -> Tensor:
        """The scores of the chosen models."""
        prompts = [self._tokenizer.decode(row) or " " for row in batch["tokens"][:, :PROMPT].tolist()]
        vectors_BD = document_vectors(self._domain, prompts, None, None, 256)
        chosen_B = torch.cdist(vectors_BD, self._means_MD).argmin(1)
        scores_BT = torch.zeros(batch["tokens"].shape)
        for number in chosen_B.unique().tolist():
            rows = (chosen_B == number).nonzero()[:, 0]
            part = Batch(batch.slots_B[rows], {name: field[rows] for name, field in batch.fields.items()})
            scores_BT[rows] = label_logprobs(self._models[number], part)
        return scores_BT


def methods(members: Members, tuned: Decoder, *, baselines: bool) -> dict[str, Score]:
    """What is measured, by name."""
    joined, names = members.joined(), list(members.team.domains)
    layers, everyone = joined.settings.layers, range(len(names) + 1)
    found: dict[str, Score] = {
        PUBLIC: of_model(members.public),
        "joined": of_model(joined),
        "tuned": of_model(tuned),
    }
    for count in range(1, len(names) + 1):
        found[f"joined, {count} of {len(names) + 1}"] = of_model(joined, Budget(top_k=count))
    for number, name in enumerate(names, 1):
        kept = tuple(one for one in everyone if one != number)
        found[f"without {name}"] = of_model(joined, Budget(experts=(kept,) * layers))
        found[f"pair {name}"] = of_model(members.pairs[name])
    if not baselines:
        return found
    dense = members.dense()
    models = [members.public, *dense.values()]
    sources = {name: members.team.expert(name).settings(members.context.seed).source for name in names}
    sources = {PUBLIC: members.team.base.settings(members.context.seed).source, **sources}
    return {
        **found,
        **{f"dense {name}": of_model(model) for name, model in dense.items()},
        "soup": of_model(average(models)),
        "weighted soup": of_weighted_average(models),
        "btm": of_ensemble(models),
        "btm, 2": of_ensemble(models, 2),
        "prompt routing": PromptRouter(sources, {PUBLIC: members.public, **dense}),
        "btx": of_model(members.built(members.team.btx())),
        "no coordination": of_model(members.uncoordinated(dense)),
        "unrestricted": of_model(members.built(members.team.everything())),
    }


def _training_rows(source: SourceSettings) -> Iterator[list[int]]:
    built = source.build(SourceContext(0, "train", EXTRACTED))
    return iter(built.fetch(0, range(EXTRACTED))["tokens"].tolist())


def measured(settings: RunSettings, tuned: Decoder) -> dict[str, float]:
    """Losses by method and domain, shares of the routing weight, and extraction."""
    asked = settings.model
    assert isinstance(asked, JoinedRouter)
    members = Members(asked.team, settings.seed)
    names = list(asked.team.domains)
    sources = {name: asked.team.expert(name).settings(settings.seed).source for name in names}
    sources = {PUBLIC: asked.team.base.settings(settings.seed).source, **sources}
    batches = {name: held_out(source, settings.seed) for name, source in sources.items()}
    whole = asked.baselines == "all"
    tuned = use_experts(tuned, len(names) + 1).eval()
    facts = {
        f"{method}/{name}": loss_of(score, batches[name])
        for method, score in methods(members, tuned, baselines=whole).items()
        for name in sources
        if not method.startswith("pair ") or method == f"pair {name}"
    }
    joined = members.joined()
    for name in sources:
        shares_E = attribution(joined, batches[name]).mean(0).tolist()
        facts |= {f"share/{name}/{other}": share for other, share in zip((PUBLIC, *names), shares_E, strict=True)}
    if whole:
        dense = members.dense()
        for name in names:
            texts = list(_training_rows(sources[name]))
            for method, model in ((PUBLIC, members.public), ("dense", dense[name]), ("joined", joined)):
                facts[f"extracted/{method}/{name}"] = extraction_rate(model, texts, prefix=PROMPT, length=32)
    return facts


def train_and_measure(settings: RunSettings, path: Path, listeners: tuple[Listener, ...]) -> tuple[Run, Outcome]:
    """The recipe's runner."""
    run, outcome = start_run(settings, path, resume=True, extra_listeners=listeners)
    if outcome.reason != "completed":
        return run, outcome
    assert isinstance(run.model, Decoder)
    facts = measured(settings, run.model)
    with JsonlLog(RunFolder(path).events_file) as log:
        log(Evaluated(step=settings.train.steps, name="joined", metrics=facts))
    return run, outcome
