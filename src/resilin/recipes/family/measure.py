"""Runs of the recipe: trained as ever, then every size of their family is read on held-out text, counted, and one
taken out.

Extraction is timed from a folder on disk to a folder of the size, beside a copy of the files that it writes.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from resilin.models.huggingface import save_pretrained
from resilin.nested.budgets import Budget
from resilin.nested.consistency import consistency
from resilin.nested.cost import cost
from resilin.nested.elastic_model import ElasticModel
from resilin.nested.extract import extract, extract_folder
from resilin.nested.in_place import decoder_in
from resilin.nested.trained_sizes import trained_sizes
from resilin.nouns import Batch
from resilin.recipes.chain_of_model.models import ReadAt
from resilin.recipes.family.operations import operations, row_length
from resilin.recipes.flexolmo.owners import JoinedRouter
from resilin.run.events import Evaluated, Listener
from resilin.run.folder import RunFolder
from resilin.run.jsonl_log import JsonlLog
from resilin.run.run import Outcome, Run
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

HELD_OUT = "everything"
"""The held-out data (`evaluation.held_out`) that all families are read on."""
BATCHES = 24
REPEATS = 5


def sizes_of(run: Run, settings: RunSettings) -> dict[str, Budget]:
    """The family, by name, ascending: what a run has trained; of joined experts one more at a time; what `ReadAt` asks
    for; or the whole model alone.
    """
    decoder = decoder_in(run.model).settings
    if isinstance(run.model, ElasticModel):
        targets = run.model.elastic.targets
        return {f"{share:g}": run.model.budget_of(number) for number, share in enumerate(targets)}
    if isinstance(settings.model, JoinedRouter):
        assert decoder.moe is not None
        most, count = decoder.moe.experts_per_token, decoder.moe.experts
        fewer = {f"{n} of {count} experts": Budget(experts=n, top_k=min(n, most)) for n in range(1, count)}
        return {**fewer, f"{count} experts": Budget()}
    if isinstance(settings.objective, ReadAt):
        parts = [Budget.from_dict(one) for one in settings.objective.budgets]
        return {str(one): one for one in parts}
    record = trained_sizes(decoder, settings.objective)
    if record is None:
        return {"whole": Budget()}
    return {name: one for name, one in record.rungs(decoder) if record.kind(decoder, one) == "trained"}


def _batches(run: Run) -> Iterator[Batch]:
    source: Any = run.validation[HELD_OUT]
    return islice((source.fetch(step, range(source.slots(step))) for step in range(len(source))), BATCHES)


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measured_extraction(run: Run, wanted: Budget) -> dict[str, float]:
    """Seconds to take a size out of the folder of the whole model, and to copy what it writes; medians, in turns."""
    with tempfile.TemporaryDirectory() as name:
        whole, small, copy = Path(name) / "whole", Path(name) / "small", Path(name) / "copy"
        save_pretrained(decoder_in(run.model), whole)
        taken, copied = [], []
        for _ in range(REPEATS):
            shutil.rmtree(small, ignore_errors=True)
            shutil.rmtree(copy, ignore_errors=True)
            taken.append(_seconds(lambda: save_pretrained(extract_folder(whole, wanted), small)))
            copied.append(_seconds(lambda: shutil.copytree(small, copy)))
        written = sum(file.stat().st_size for file in small.iterdir())
    return {
        "extraction/seconds": statistics.median(taken),
        "extraction/copy_seconds": statistics.median(copied),
        "extraction/bytes": float(written),
    }


def measured_family(run: Run, settings: RunSettings) -> dict[str, float]:
    """Everything about a run's family."""
    sizes, decoder = sizes_of(run, settings), decoder_in(run.model)
    length = row_length(settings.source)
    read = consistency(run.model, list(sizes.values()), _batches(run))
    facts = {"operations": operations(settings, run.model)}
    apart = 0
    for (name, wanted), quality in zip(sizes.items(), read, strict=True):
        told = cost(decoder.settings, wanted, sequence_length=length)
        numbers = {
            "loss": quality.loss, "agreement": quality.agreement, "parameters": float(told.parameters),
            "flops": told.flops, "kv_bytes": float(told.kv_bytes),
        }  # fmt: skip
        facts |= {f"size/{name}/{key}": value for key, value in numbers.items()}
        apart += sum(one.numel() * one.element_size() for one in extract(decoder, wanted).parameters())
    facts["memory/family"] = float(sum(one.numel() * one.element_size() for one in decoder.parameters()))
    facts["memory/apart"] = float(apart)
    return facts | measured_extraction(run, next(iter(sizes.values())))


def train_and_measure(settings: RunSettings, path: Path, listeners: tuple[Listener, ...]) -> tuple[Run, Outcome]:
    """The recipe's runner."""
    run, outcome = start_run(settings, path, resume=True, extra_listeners=listeners)
    if outcome.reason != "completed":
        return run, outcome
    facts = measured_family(run, settings)
    with JsonlLog(RunFolder(path).events_file) as log:
        log(Evaluated(step=settings.train.steps, name="family", metrics=facts))
    return run, outcome
