"""A run's folder: where its settings, events and checkpoints lie, and whether it may be continued."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilin.checkpoint.storage import Location, as_location
from resilin.config import UserError, load_settings, settings_to_toml
from resilin.run.settings import RunSettings

MAY_CHANGE = (
    "name",
    "train.micro_batch_size",
    "train.device",
    "train.threads",
    "train.non_finite",
    "train.non_finite_cap",
    "memory",
    "parallel",
    "cluster",
    "precision",
    "checkpoint",
    "evaluation",
    "log",
)
"""Settings that a resumed run may have otherwise: none of them decides what is learned (beyond rounding)."""


class RunFolderError(UserError):
    """A run folder that cannot be used as asked; the text is for the user."""


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def changed_settings(old: RunSettings, new: RunSettings) -> list[str]:
    """The settings that differ in a way that would train something else, as `key: old -> new`."""
    before, after = (dict(_leaves(settings.model_dump(mode="json"))) for settings in (old, new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and not any(key == k or key.startswith(k + ".") for k in MAY_CHANGE)
    ]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths inside a run's folder."""

    path: Path

    @property
    def writes(self) -> str:
        """The command that lets the model write: in a conversation, where its tokenizer has a form for one."""
        file = self.tokenizer / "tokenizer_config.json"
        talks = file.is_file() and "chat_template" in json.loads(file.read_text(encoding="utf-8"))
        return f"resilin generate {self.path} {'--chat -p' if talks else '--prompt'} '...'"

    @property
    def settings_file(self) -> Path:
        """The complete settings the run was started with."""
        return self.path / "settings.toml"

    @property
    def events_file(self) -> Path:
        """One JSON object a line for everything that happened."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder a saved step, unless the settings name another place."""
        return self.path / "checkpoints"

    def checkpoints_of(self, settings: RunSettings | None = None) -> Location:
        """Where checkpoints are: there, or where the settings (None: those stored here) say."""
        settings = self.settings() if settings is None and self.holds_run() else settings
        return as_location(settings.checkpoint.path) if settings and settings.checkpoint.path else self.checkpoints

    @property
    def tokenizer(self) -> Path:
        """The tokenizer the run was trained with."""
        return self.path / "tokenizer"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files."""
        return self.path / "tensorboard"

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.settings_file.exists()

    def settings(self) -> RunSettings:
        """The settings stored here."""
        if not self.holds_run():
            raise RunFolderError(f"{self.path}: no run was started here (it has no settings.toml)")
        return load_settings(RunSettings, self.settings_file)

    def prepare(self, settings: RunSettings, *, resume: bool, accept_changes: bool = False) -> None:
        """Make the folder ready for a run with these settings, which `store` then writes.

        Raises:
            RunFolderError: where a run exists already and `resume` is not set, or where the settings would train
                something else than the run that is to be continued (unless `accept_changes`).
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path}: is a file; a run needs a folder")
        if self.holds_run():
            if not resume:
                raise RunFolderError(
                    f"{self.path}: holds a run already; continue it with --resume, or choose another with --folder"
                )
            changes = changed_settings(self.settings(), settings)
            if changes and not accept_changes:
                raise RunFolderError(
                    "\n  ".join(
                        [f"{self.path}: the settings differ from those of the run that is to be continued:", *changes]
                    )
                    + "\nUse the same settings, another --folder, or --accept-changes if you mean it."
                )
        self.path.mkdir(parents=True, exist_ok=True)

    def store(self, settings: RunSettings) -> None:
        """Write the settings: from now on the folder holds a run."""
        self.settings_file.write_text(settings_to_toml(settings), encoding="utf-8")
