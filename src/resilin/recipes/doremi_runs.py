"""DoReMi's first two runs, made where the third one asks for their result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from resilin.config import component
from resilin.config.errors import UserError
from resilin.models.settings import ModelSettings
from resilin.optim.settings import OptimizerSettings
from resilin.run.settings import CheckpointSettings, EvaluationSettings, LogSettings, RunSettings, TrainSettings
from resilin.run.start import start_run
from resilin.run.trained import Trained
from resilin.steer.doremi import WEIGHTS_FILE, DoReMi
from resilin.steer.fingerprint import fingerprint
from resilin.steer.mix import MixedSource
from resilin.steer.mixer import Fixed, Mixer, MixLook
from resilin.steer.weight import Weighted

Steps = Annotated[int, Field(ge=1)]


class AfterProxy(Mixer):
    """The mean weights of a DoReMi proxy run on the same domains; reference and proxy are trained if they are missing.

    Both train on the domains in the source's initial proportions.
    """

    model: Annotated[ModelSettings, component("resilin.models.decoder_settings:DecoderSettings")] = Field(
        default_factory=dict, validate_default=True
    )
    """Reference and proxy."""
    optimizer: Annotated[OptimizerSettings, component("resilin.optim.adamw:AdamW")] = Field(
        default_factory=dict, validate_default=True
    )
    """Of both."""
    steps: Steps = 1000
    """Of each run."""
    eta: Annotated[float, Field(ge=0)] = 0.1
    """DoReMi's step size."""
    c: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Its smoothing."""
    centred: bool = False
    """The centred form."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """The clipped form."""
    cache: Path = Path(".data/doremi")
    """Where the two runs are kept."""

    def mix(self, look: MixLook) -> Sequence[float]:
        """The weights, computed once.

        Raises:
            UserError: a run did not finish.
        """
        if "weights" not in look.memory:
            look.memory["weights"] = self._weights(look)
        weights: list[float] = look.memory["weights"]
        return weights

    def _weights(self, look: MixLook) -> list[float]:
        source = look.pool
        assert isinstance(source, MixedSource)
        plain = source.settings.model_copy(update={"mixer": Fixed(), "warmup_steps": 0})
        threads = torch.get_num_threads()
        device = "cuda" if next(look.model.parameters()).is_cuda else "cpu"
        reference = RunSettings(
            name="reference",
            seed=look.seed,
            source=plain,
            model=self.model,
            optimizer=self.optimizer,
            train=TrainSettings(steps=self.steps, batch_size=source.batch_size, device=device, threads=threads),
            checkpoint=CheckpointSettings(every=0),
            evaluation=EvaluationSettings(every=0),
            log=LogSettings(tensorboard=False, live=False),
        )
        key = fingerprint(reference.model_dump(mode="json", exclude={"train": {"threads"}}), source.digest)
        first, second = self.cache / key / "reference", self.cache / key / "proxy"
        self._train(reference, first)
        weighter = DoReMi(reference=Trained(path=first), eta=self.eta, c=self.c, centred=self.centred, clip=self.clip)
        proxy = reference.model_copy(update={"name": "proxy", "objective": Weighted(weighter=weighter)})
        self._train(proxy, second)
        found = Fixed(weights_file=second / WEIGHTS_FILE).mix(look)
        torch.set_num_threads(threads)
        return list(found)

    def _train(self, settings: RunSettings, folder: Path) -> None:
        _, outcome = start_run(settings, folder, resume=True)
        if outcome.reason != "completed":
            raise UserError(f"{folder}: DoReMi's {settings.name} run {outcome.reason}: {outcome.message}")
