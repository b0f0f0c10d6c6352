"""A model that another run leaves behind: the stages of a pipeline as nested settings.

The earlier run is trained when its model is first asked for, in a folder named by its settings and seed, and only
opened from then on. A stage may itself start from a stage.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import nn

from resilin.config import parse_settings
from resilin.config.errors import UserError
from resilin.models.plain import make_plain
from resilin.models.settings import ModelContext, ModelSettings
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

WEIGHTS = "model.safetensors"
_NO_NUMBERS = ("name", "checkpoint", "log")


class StageError(UserError):
    """A run that an other one starts from, and that did not end well."""


class Stage(ModelSettings):
    """The model at the end of a run."""

    run: dict[str, Any]
    """The settings of that run; the seed, where it names none, is that of the run that starts from it."""
    folder: Path = Field(default=Path("runs/recipes/stages"))
    """Where such runs are kept."""

    @model_validator(mode="after")
    def _run_is_one(self) -> Stage:
        parse_settings(RunSettings, self.run, "the run of a stage")
        return self

    def settings(self, seed: int) -> RunSettings:
        """The run's settings with everything said."""
        quiet = {"live": False, "tensorboard": False}
        tree = {"seed": seed, **self.run, "log": {**quiet, **self.run.get("log", {})}}
        return parse_settings(RunSettings, tree, "the run of a stage")

    def place(self, settings: RunSettings) -> Path:
        """The folder of a run: 16 digits of a hash of what decides its numbers."""
        tree = {k: v for k, v in settings.model_dump(mode="json").items() if k not in _NO_NUMBERS}
        return self.folder / hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]

    def build(self, context: ModelContext) -> nn.Module:
        """The model, in float32 on the CPU; trains it where that has not been done.

        Raises:
            StageError: the run failed or was interrupted.
        """
        settings = self.settings(context.seed)
        place = self.place(settings)
        if not (place / WEIGHTS).is_file():
            run, outcome = start_run(settings, place, resume=True)
            if outcome.reason != "completed":
                raise StageError(f"{place}: the run that this one starts from {outcome.reason}: {outcome.message}")
            state = {name: tensor.detach().cpu().clone() for name, tensor in run.model.state_dict().items()}
            state |= {"vocab_size": torch.tensor(run.source.vocab_size)}  # type: ignore[attr-defined]
            save_file(state, place / f".{WEIGHTS}")
            (place / f".{WEIGHTS}").replace(place / WEIGHTS)
        state = load_file(place / WEIGHTS)
        vocabulary = int(state.pop("vocab_size"))
        model = settings.model.build(ModelContext(settings.seed, vocabulary))
        model.load_state_dict(state)
        return make_plain(model)
