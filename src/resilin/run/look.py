"""Facts for people about whatever lies at a path: settings, a run, a checkpoint, a model, token shards."""

from __future__ import annotations

from pathlib import Path

from resilin.checkpoint.inspect import TensorLine
from resilin.checkpoint.storage import Location
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


def at_checkpoint(path: Location, *, verify: bool = False, step: int | None = None, tensors: bool = False) -> Facts:
    """A checkpoint's parts, and its largest tensors.

    Args:
        path: a checkpoint, a run, or a folder or URL of checkpoints.
        verify: read every byte and compare checksums.
        step: which of several; None: the newest.
        tensors: list every tensor and value.
    """
    from resilin.checkpoint import inspect

    found = inspect.verify(path, step) if verify else inspect.describe(path, step)
    parts = [
        (
            part.name,
            f"{part.tensors} tensors, {part.numbers:,} numbers, {part.bytes / 2**20:.1f} MiB; {part.values} values",
        )
        for part in found.parts
    ]
    shown = found.tensors if tensors else sorted(found.tensors, key=lambda line: -line.bytes)[:8]
    whole = "every checksum agrees" if verify else "index and file sizes agree (verify reads everything)"
    facts: Facts = {
        "checkpoint": [
            ("where", str(found.path)),
            ("step", f"{found.step:,}"),
            ("size", f"{found.bytes / 2**20:.1f} MiB in {found.files} files"),
            ("whole", whole),
        ],
        "parts": parts,
        "tensors" if tensors else "largest": [(line.name, _tensor_in_words(line)) for line in shown],
    }
    if tensors:
        facts["values"] = [(name, str(value)) for name, value in found.values.items()]
    return facts


def _tensor_in_words(line: TensorLine) -> str:
    pieces = f" in {line.pieces} pieces" if line.pieces > 1 else ""
    tied = f", the same as {', '.join(line.shared)}" if line.shared else ""
    return f"{line.dtype} {list(line.shape)}{pieces}{tied}"


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
