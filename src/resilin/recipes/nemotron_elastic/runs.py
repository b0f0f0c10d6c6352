"""Runs of the recipe: trained as ever; then each sub-model is measured, as it was trained and as it would have been cut
out of the parent without training, by the ranking and by a ranking that says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.inference.scoring import evaluating
from resilin.models.decoder import Decoder
from resilin.models.settings import ModelContext
from resilin.nested.budgets import Budget
from resilin.nested.elastic import cost_of
from resilin.nested.elastic_model import Elastic, ElasticModel
from resilin.nested.in_place import budget, full
from resilin.nouns import Batch
from resilin.objective.next_token import IGNORE
from resilin.run.events import Evaluated, Listener
from resilin.run.folder import RunFolder
from resilin.run.jsonl_log import JsonlLog
from resilin.run.run import Outcome, Run
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

MEASURED = "sub-models"
"""What the evaluation of sub-models is called."""
BATCHES = 16
"""Held-out batches that sub-models are measured on."""


def _batches(run: Run) -> Iterator[Batch]:
    source: Any = run.validation["validation"]
    return islice((source.fetch(step, range(source.slots(step))) for step in range(len(source))), BATCHES)


def _logprobs(model: Decoder, batch: Batch) -> Tensor:
    """(N, V) of the tokens that count."""
    output = model(batch["tokens"], batch.get("positions"), batch.get("documents"))
    found: Tensor = model.logits(output.hidden_BTD[batch["labels"] != IGNORE]).log_softmax(-1)
    return found


@torch.no_grad()
def measured(model: Decoder, budgets: dict[str, Budget], parent: Decoder, batches: Iterator[Batch]) -> dict[str, float]:
    """Loss of each budget, and its divergence from the parent, by name; and the parent's loss."""
    nll, kl, tokens = dict.fromkeys((*budgets, "parent"), 0.0), dict.fromkeys(budgets, 0.0), 0
    with evaluating(model), evaluating(parent):
        for batch in batches:
            labels_N = batch["labels"][batch["labels"] != IGNORE]
            tokens += len(labels_N)
            with full(parent):
                its_NV = _logprobs(parent, batch)
            nll["parent"] -= float(its_NV.gather(1, labels_N[:, None]).double().sum())
            for name, wanted in budgets.items():
                with budget(model, wanted):
                    mine_NV = _logprobs(model, batch)
                nll[name] -= float(mine_NV.gather(1, labels_N[:, None]).double().sum())
                kl[name] += float((its_NV.exp() * (its_NV - mine_NV)).double().sum())
    found = {f"{name}/kl": value / tokens for name, value in kl.items()}
    return found | {f"{name}/loss": value / tokens for name, value in nll.items()}


def _facts(run: Run, settings: Elastic, elastic: ElasticModel, seed: int) -> dict[str, float]:
    context = ModelContext(seed, getattr(run.source, "vocab_size", None))
    parent = settings.model.build(context)
    assert isinstance(parent, Decoder)
    budgets = {f"{share:g}": elastic.budget_of(number) for number, share in enumerate(settings.targets)}
    found = {f"trained/{name}": value for name, value in _measured(run, elastic.decoder, budgets, parent).items()}
    for by in ("activation", "random"):
        # Layers as the trained model ranked them: what is compared is the order inside them.
        cut = settings.model_copy(update={"ranking": by, "depth_ranking": "none"}).build(context)
        found |= {f"{by}/{name}": value for name, value in _measured(run, cut.decoder, budgets, parent).items()}
    for number, share in enumerate(settings.targets):
        found[f"trained/{share:g}/cost"] = cost_of(elastic, number)
    return found


def _measured(run: Run, model: Decoder, budgets: dict[str, Budget], parent: Decoder) -> dict[str, float]:
    return measured(model, budgets, parent, _batches(run))


def train_elastic(settings: RunSettings, path: Path, listeners: tuple[Listener, ...]) -> tuple[Run, Outcome]:
    """The recipe's runner."""
    run, outcome = start_run(settings, path, resume=True, extra_listeners=listeners)
    if outcome.reason != "completed" or not isinstance(run.model, ElasticModel):
        return run, outcome
    assert isinstance(settings.model, Elastic)
    facts = _facts(run, settings.model, run.model, settings.seed)
    with JsonlLog(RunFolder(path).events_file) as log:
        log(Evaluated(step=settings.train.steps, name=MEASURED, metrics=facts))
    return run, outcome
