"""What a finished run tells its user: how it went, what lies where, what to try next."""

from __future__ import annotations

import math
from pathlib import Path

from rich.table import Table

from resilin.run.folder import RunFolder
from resilin.run.run import Outcome


def summary(path: Path, outcome: Outcome) -> Table:
    """The closing table of `resilin train`."""
    folder = RunFolder(path)
    table = Table(
        title=f"run {outcome.reason} at step {outcome.step}", title_justify="left", show_header=False, box=None
    )
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in outcome.metrics.items():
        if name.endswith("loss") and math.isfinite(value):
            table.add_row(name, f"{value:.4f}")
    for name, at in (
        ("settings", folder.settings_file),
        ("events", folder.events_file),
        ("curves", folder.tensorboard),
        ("checkpoint", outcome.checkpoint),
        ("tokenizer", folder.tokenizer),
    ):
        if at is not None and (isinstance(at, str) or at.exists()):  # the text is a URL
            table.add_row(name, str(at))
    if outcome.reason == "completed":
        table.add_row("try next", folder.writes)
        table.add_row("", f"resilin export {path} {path}/huggingface")
        table.add_row("", f"tensorboard --logdir {path}")
    else:
        table.add_row("go on", "the same command with --resume")
    return table
