"""DoReMi's first two runs, made where the third one asks for their result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from resilin.config import component
from resilin.models.settings import ModelSettings
from resilin.optim.settings import OptimizerSettings
from resilin.recipes.stage import Stage
from resilin.steer.doremi import WEIGHTS_FILE
from resilin.steer.evaluating import device_of
from resilin.steer.mix import MixedSource
from resilin.steer.mixer import Fixed, Mixer, MixLook

Steps = Annotated[int, Field(ge=1)]


class AfterProxy(Mixer):
    """The mean weights of a DoReMi proxy run on the same domains; reference and proxy are trained if they are missing.

    Both train on the domains in the source's initial proportions, and are stages (`resilin.recipes.stage`): proxies
    with other step sizes share their reference.
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
    folder: Path = Field(default=Path("runs/recipes/stages"))
    """Where the two runs are kept."""

    def mix(self, look: MixLook) -> Sequence[float]:
        """The weights, computed once.

        Raises:
            StageError: a run did not finish.
        """
        if "weights" not in look.memory:
            proxy = self.proxy(look)
            place = proxy.trained(proxy.settings(look.seed))
            look.memory["weights"] = list(Fixed(weights_file=place / WEIGHTS_FILE).mix(look))
        weights: list[float] = look.memory["weights"]
        return weights

    def proxy(self, look: MixLook) -> Stage:
        """The proxy run for a run on domains."""
        source = look.pool
        assert isinstance(source, MixedSource)
        own = self.model_dump(mode="json")
        plain = source.settings.model_copy(update={"mixer": Fixed(), "warmup_steps": 0})
        reference: dict[str, Any] = {
            "source": {"use": "resilin.steer.mix:Mixed", **plain.model_dump(mode="json")},
            "model": own["model"],
            "optimizer": own["optimizer"],
            "train": {"steps": self.steps, "batch_size": source.batch_size, "device": device_of(look.model).type},
            "checkpoint": {"every": 0},
            "evaluation": {"every": 0},
        }
        weighter = {
            "use": "resilin.steer.doremi:DoReMi",
            "reference": {"use": "resilin.recipes.stage:Stage", "run": reference, "folder": own["folder"]},
            **{name: own[name] for name in ("eta", "c", "centred", "clip")},
        }
        objective = {"use": "resilin.steer.weight:Weighted", "weighter": weighter}
        return Stage(run={**reference, "objective": objective}, folder=self.folder)
