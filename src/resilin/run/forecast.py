"""What settings would run, told without running: sizes, work and memory."""

from __future__ import annotations

from dataclasses import dataclass, fields

from resilin.memory.tier_report import planned_bytes
from resilin.models.decoder import Decoder
from resilin.models.flops import parameter_counts
from resilin.models.memory import memory_estimate
from resilin.models.settings import ModelContext
from resilin.models.step_flops import step_flops_per_token
from resilin.run.build import build_sources, steps_of
from resilin.run.settings import RunSettings


@dataclass(frozen=True, slots=True)
class Forecast:
    """Facts about a run, in groups, as (name, text) pairs for people."""

    groups: dict[str, list[tuple[str, str]]]


def _count(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def _run_facts(settings: RunSettings, steps: int) -> list[tuple[str, str]]:
    train = settings.train
    micro = train.micro_batch_size or train.batch_size
    return [
        ("steps", f"{steps:,}" + (", with which the source ends" if steps != train.steps else "")),
        ("batch", f"{train.batch_size} samples, computed {micro} at a time"),
        ("optimizer", type(settings.optimizer).__name__),
        ("objective", type(settings.objective).__name__),
        ("precision", settings.precision.compute + (", compiled" if settings.precision.compile else "")),
        ("folder", str(settings.default_folder())),
    ]


def _decoder_facts(model: Decoder, settings: RunSettings, steps: int, length: int) -> dict[str, list[tuple[str, str]]]:
    counts, shape = parameter_counts(model.settings), model.settings
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    per_token = step_flops_per_token(model, length)
    tokens = steps * settings.train.batch_size * length
    micro = settings.train.micro_batch_size or settings.train.batch_size
    value_bytes = 2 if settings.precision.compute == "bf16" else 4
    memory = memory_estimate(model, micro, length, value_bytes=value_bytes)
    size = [
        ("parameters", f"{total:,}"),
        *([("trained", f"{trained:,} ({trained / total:.2%})")] if trained != total else []),
        ("without embeddings", f"{counts.non_embedding:,}"),
        *([("active per token", f"{counts.active:,}")] if counts.active != counts.total else []),
        (
            "shape",
            f"{shape.layers} layers x {shape.hidden_size}, {shape.heads} heads, vocabulary {shape.vocab_size:,}",
        ),
    ]
    work = [
        ("per token", f"{_count(per_token)}FLOP (forward and backward)"),
        ("per step", f"{_count(per_token * settings.train.batch_size * length)}FLOP"),
        ("whole run", f"{_count(per_token * tokens)}FLOP over {tokens:,} tokens"),
    ]
    if trained == total:
        work.append(("tokens per parameter", f"{tokens / counts.non_embedding:.2f} (without embeddings)"))
    parts = [(item.name, _bytes(getattr(memory, item.name))) for item in fields(memory)]
    return {"model": size, "work": work, "memory (estimate)": [*parts, ("together", _bytes(memory.total))]}


def forecast(settings: RunSettings) -> Forecast:
    """The facts; data is opened (and tokenised, where it was not yet) to learn its size, nothing is trained."""
    source = build_sources(settings, validation=False).source
    length = int(getattr(source, "sequence_length", 0))
    steps = steps_of(settings, source)
    groups = {"run": _run_facts(settings, steps)}
    facts = [("source", type(settings.source).__name__)]
    if length:
        facts.append(("sequence length", f"{length:,}"))
    stream = getattr(source, "stream", None)
    if stream is not None:
        tokens, needed = len(stream), steps * settings.train.batch_size * length
        facts += [("tokens", f"{tokens:,}"), ("passes over them", f"{needed / tokens:.2f}")]
    groups["data"] = facts
    model = settings.model.outline(ModelContext(settings.seed, getattr(source, "vocab_size", None))) if length else None
    if isinstance(model, Decoder):
        groups |= _decoder_facts(model, settings, steps, length)
        if settings.memory.experts is not None:
            workers = settings.parallel.expert if isinstance(settings.parallel.expert, int) else 1
            tiers = planned_bytes(settings.memory.experts, settings.optimizer, model, steps, workers)
            groups["experts, in place of the above (at most)"] = [(tier, _bytes(size)) for tier, size in tiers.items()]
    return Forecast(groups)
