"""Facts for people about whatever lies at a path: settings, a run, a checkpoint, a model, token shards."""

from __future__ import annotations

from pathlib import Path

from resilin.config import UserError
from resilin.run.settings import RunSettings

Facts = dict[str, list[tuple[str, str]]]


def at_settings(settings: RunSettings) -> Facts:
    """What these settings would run."""
    from resilin.run.forecast import forecast

    return forecast(settings).groups


def at_path(path: Path, *, verify: bool) -> Facts:
    """What lies at a path.

    Raises:
        UserError: when nothing known does.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if (path / "settings.toml").exists():
        from resilin.run.overview import overview

        facts = overview(path)
        return facts | at_checkpoint(path, verify=True) if verify else facts
    if path.name.startswith("step-") or path.name == "checkpoints":
        return at_checkpoint(path, verify=verify)
    if (path / "config.json").exists() or path.suffix == ".gguf":
        return at_model(path)
    return at_data(path, verify=verify)


def at_data(path: Path, *, verify: bool) -> Facts:
    """Token shards, or files that could become some."""
    from resilin.data.describe import describe
    from resilin.data.shards import TokenShards

    found = describe(path)
    rows = [(name.replace("_", " "), _in_words(value)) for name, value in found.items() if value is not None]
    if verify and found["kind"] == "token shards":
        problems = TokenShards(path).verify()
        rows += [("damaged", str(problem.error())) for problem in problems] or [("verified", "every checksum agrees")]
    return {"data": rows}


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_in_words, value)) or "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def at_checkpoint(path: Path, *, verify: bool) -> Facts:
    """A checkpoint's parts, and its largest tensors."""
    from resilin.checkpoint import inspect

    found = inspect.verify(path) if verify else inspect.describe(path)
    parts = [
        (
            part.name,
            f"{part.tensors} tensors, {part.numbers:,} numbers, {part.bytes / 2**20:.1f} MiB; {part.values} values",
        )
        for part in found.parts
    ]
    largest = sorted(found.tensors, key=lambda line: -line.bytes)[:8]
    return {
        "checkpoint": [
            ("step", f"{found.step:,}"),
            ("size", f"{found.bytes / 2**20:.1f} MiB"),
            (
                "whole",
                "every checksum agrees" if verify else "index and file sizes agree (--verify reads everything)",
            ),
        ],
        "parts": parts,
        "largest": [(line.name, f"{line.dtype} {list(line.shape)}") for line in largest],
    }


def at_model(path: Path) -> Facts:
    """A model of another tool's making."""
    from resilin.models.flops import parameter_counts
    from resilin.run.open_model import open_model

    opened = open_model(path)
    settings = opened.model.settings
    counts = parameter_counts(settings)
    shape = f"{settings.layers} layers x {settings.hidden_size}, {settings.heads} heads ({settings.key_heads} of keys)"
    return {
        "model": [
            ("what", opened.description),
            ("parameters", f"{counts.total:,} ({counts.non_embedding:,} without embeddings)"),
            ("shape", shape),
            ("vocabulary", f"{settings.vocab_size:,}"),
            ("positions", f"{settings.max_positions:,}"),
        ]
    }
