"""A model that an earlier run leaves behind: runs that start from a run, as nested settings.

    [settings.model]
    use = "resilin.recipes.stage:Stage"
    run.train.steps = 1000                # any settings of a run: source, model, optimizer, ...

The earlier run is trained when its model is first asked for, and only read from then on: all runs of a recipe that ask
for the same one share it. A stage may start from a stage. Without a seed of its own it has that of the run that starts
from it, so each seed of a recipe has its own earlier run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from resilin.config import Settings, parse_settings
from resilin.config.errors import UserError
from resilin.data.settings import SourceContext
from resilin.models.chain_freeze import trained_again
from resilin.models.plain import make_plain
from resilin.models.settings import ModelContext, ModelSettings
from resilin.recipes.results import hashed_versions
from resilin.run.folder import RunFolder
from resilin.run.settings import RunSettings
from resilin.run.start import start_run

WEIGHTS = "model.safetensors"
_NO_NUMBERS = ("name", "checkpoint", "log")
_WHERE = "the run of a stage"


class StageError(UserError):
    """An earlier run that did not end well, or a later one that it does not fit; the text says which folder."""


class Stage(ModelSettings):
    """The model at the end of another run, made plain (adapters merged, masks applied), in float32 on the CPU."""

    run: dict[str, Any]
    """The settings of that run, as a tree."""
    folder: Path = Field(default=Path("runs/recipes/stages"))
    """Where such runs are kept, each in a folder named by its settings, its data, and the versions of Resilin and
    torch. Remove a folder to train its run anew."""

    @model_validator(mode="after")
    def _run_is_one(self) -> Stage:
        parse_settings(RunSettings, self.run, _WHERE)
        return self

    def settings(self, seed: int) -> RunSettings:
        """The run's settings for a seed, with everything said."""
        log = {"live": False, "tensorboard": False, **self.run.get("log", {})}
        # The threads are this process's own: the run that asks for the model must not be left with others.
        train = {**self.run.get("train", {}), "threads": torch.get_num_threads()}
        return parse_settings(RunSettings, {"seed": seed, **self.run, "log": log, "train": train}, _WHERE)

    def place(self, settings: RunSettings) -> Path:
        """The folder of a run, by a hash of what decides its numbers."""
        tree = {key: value for key, value in settings.model_dump(mode="json").items() if key not in _NO_NUMBERS}
        del tree["train"]["threads"]
        source = settings.source.build(SourceContext(settings.seed, "train", settings.train.batch_size))
        text = json.dumps([tree, str(getattr(source, "digest", "")), hashed_versions()], sort_keys=True)
        return self.folder / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def trained(self, settings: RunSettings) -> Path:
        """The folder of the finished run; trains it where that has not been done, while others that want it wait.

        Raises:
            StageError: the run failed or was interrupted.
        """
        place = self.place(settings)
        if not (place / WEIGHTS).is_file():
            with _alone(place):
                if not (place / WEIGHTS).is_file():
                    _train(settings, place)
        return place

    def build(self, context: ModelContext) -> nn.Module:
        """The model.

        Raises:
            StageError: the run failed or was interrupted; or it knows fewer tokens than the source.
        """
        settings = self.settings(context.seed)
        place = self.trained(settings)
        with safe_open(place / WEIGHTS, framework="pt") as file:
            known = json.loads(file.metadata()["vocab_size"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if known is not None and context.vocab_size is not None and context.vocab_size > known:
            raise StageError(
                f"{place}: the earlier run knows {known} tokens, the source's tokenizer has {context.vocab_size}: "
                "give both runs the same tokenizer"
            )
        model = settings.model.build(ModelContext(settings.seed, known))
        model.load_state_dict(state)
        return trained_again(make_plain(model))


def forget_stages(settings: RunSettings) -> None:
    """Remove the earlier runs that a run starts from, and those that they start from, so that they are trained again.

    Wherever its settings hold a `Stage`, or settings that make one of themselves (`stage()`).
    """
    for place in _places(settings, settings.seed):
        shutil.rmtree(place, ignore_errors=True)


def _places(value: Any, seed: int) -> Iterator[Path]:
    stage = getattr(value, "stage", None)
    if isinstance(value, Stage):
        earlier = value.settings(seed)
        yield from _places(earlier, earlier.seed)
        yield value.place(earlier)
    elif isinstance(value, Settings) and callable(stage):
        yield from _places(stage(), seed)
    elif isinstance(value, Settings):
        for name in type(value).model_fields:
            yield from _places(getattr(value, name), seed)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _places(item, seed)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _places(item, seed)


def _train(settings: RunSettings, place: Path) -> None:
    run, outcome = start_run(settings, place, resume=True)
    if outcome.reason != "completed":
        raise StageError(
            f"{place}: the earlier run that this one starts from was not finished ({outcome.reason}): "
            f"{outcome.message}; the same command goes on with it"
        )
    state = {name: tensor.detach().cpu().clone() for name, tensor in run.model.state_dict().items()}
    about = {"vocab_size": json.dumps(getattr(run.source, "vocab_size", None))}
    save_file(state, place / f".{WEIGHTS}", metadata=about)
    (place / f".{WEIGHTS}").replace(place / WEIGHTS)
    shutil.rmtree(RunFolder(place).checkpoints, ignore_errors=True)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Waits until no other process trains this run."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
