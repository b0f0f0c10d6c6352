"""What a run's folder holds: how far it came, what lies where, what to try next."""

from __future__ import annotations

from pathlib import Path

from resilin.checkpoint.folder import CheckpointFolder
from resilin.run.events import Evaluated, RunStarted, StepDone
from resilin.run.folder import RunFolder
from resilin.run.history import read_events

Facts = dict[str, list[tuple[str, str]]]


def overview(path: Path) -> Facts:
    """Facts about a run, in groups, as (name, text) pairs."""
    folder = RunFolder(path)
    settings = folder.settings()
    events = read_events(path) if folder.events_file.exists() else []
    steps = [event for event in events if isinstance(event, StepDone)]
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    started = next((event for event in reversed(events) if isinstance(event, RunStarted)), None)
    whole = started.total_steps if started is not None else settings.train.steps
    progress = [("steps", f"{steps[-1].step if steps else 0:,} of {whole:,}")]
    if started is not None:
        progress += [("parameters", f"{started.parameters:,}"), ("device", started.device)]
    if steps:
        speed = sorted(step.units_per_second for step in steps)[len(steps) // 2]
        progress.append(("training loss", f"{steps[0].loss:.4f} at first, {steps[-1].loss:.4f} at last"))
        unit = started.unit if started is not None else "units"
        progress.append(("throughput", f"{speed:,.0f} {unit}/s (median)"))
    for name in dict.fromkeys(event.name for event in evaluations):
        mine = [event for event in evaluations if event.name == name]
        first, last = mine[0], mine[-1]
        progress.append(
            (f"{name} loss", f"{first.metrics['loss']:.4f} at step {first.step}, {last.metrics['loss']:.4f} at last")
        )
    store = CheckpointFolder(folder.checkpoints_of(settings))
    saved = store.steps()
    places = [("settings", str(folder.settings_file)), ("events", str(folder.events_file))]
    places += [("checkpoints", f"{store.path} (steps {', '.join(map(str, saved)) or 'none'})")]
    places += [
        (name, str(at)) for name, at in (("curves", folder.tensorboard), ("tokenizer", folder.tokenizer)) if at.exists()
    ]
    places += [("export", str(at.parent)) for at in sorted(path.glob("*/config.json"))]
    return {"progress": progress, "what lies where": places, "try next": next_steps(path, bool(saved))}


def next_steps(path: Path, saved: bool) -> list[tuple[str, str]]:
    """Commands that go on from here."""
    if not saved:
        return [("train", f"resilin train {path}/settings.toml --folder {path} --resume")]
    return [
        ("write text", RunFolder(path).writes),
        ("measure", f"resilin evaluate {path} --text FILE"),
        ("open elsewhere", f"resilin export {path} {path}/huggingface"),
        ("see curves", f"tensorboard --logdir {path}"),
        ("train on", f"resilin train {path}/settings.toml train.steps=... --folder {path} --resume --accept-changes"),
    ]
