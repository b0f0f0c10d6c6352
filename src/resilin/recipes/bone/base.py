"""A base model that is trained where it is first asked for."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from safetensors.torch import load_file, save_file
from torch import nn

from resilin.config.load import parse_settings
from resilin.models.settings import ModelContext, ModelSettings
from resilin.run.settings import RunSettings
from resilin.run.start import start_run


def _run_settings(value: object) -> object:
    return parse_settings(RunSettings, value, "the base's run") if isinstance(value, dict) else value


class TrainedHere(ModelSettings):
    """The model of a run: trained at its first use, its weights kept in `cache` and read from there afterwards."""

    run: Annotated[RunSettings, BeforeValidator(_run_settings)]
    """The run that trains it, seed and all."""
    cache: Path = Field(default=Path(".data"))
    """Where its weights are kept, under a name made of the run's settings and the version of torch."""

    @property
    def weights(self) -> Path:
        """The file of the weights."""
        fixed: dict[str, Any] = self.run.model_dump(mode="json", exclude={"name", "log", "checkpoint"})
        text = json.dumps([fixed, torch.__version__], sort_keys=True)
        return self.cache / f"base-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"

    def build(self, context: ModelContext) -> nn.Module:
        """The model with its trained weights, on the CPU."""
        if not self.weights.exists():
            self._train()
        model = self.run.model.build(ModelContext(self.run.seed, context.vocab_size))
        model.load_state_dict(load_file(self.weights))
        return model

    def _train(self) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads()
        # The trained file appears whole or not at all, also where several processes want it at once.
        folder = Path(tempfile.mkdtemp(prefix="base-", dir=self.cache))
        try:
            quiet = self.run.log.model_copy(update={"live": False, "tensorboard": False})
            own = self.run.train.model_copy(update={"threads": threads})
            run, outcome = start_run(self.run.model_copy(update={"log": quiet, "train": own}), folder / "run")
            if outcome.reason != "completed":
                raise KeyboardInterrupt if outcome.reason == "interrupted" else RuntimeError(outcome.message)
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in run.model.state_dict().items()}
            save_file(state, folder / "weights")
            (folder / "weights").replace(self.weights)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
