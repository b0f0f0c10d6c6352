"""The settings of a run: four nouns and how to take them through the steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from resilin.cluster.settings import ClusterSettings
from resilin.config import Settings, component
from resilin.data.settings import SourceSettings
from resilin.memory.settings import MemorySettings
from resilin.models.settings import ModelSettings
from resilin.objective.settings import ObjectiveSettings
from resilin.optim.settings import OptimizerSettings
from resilin.parallel.settings import ParallelSettings
from resilin.precision.settings import PrecisionSettings

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class TrainSettings(Settings):
    """How many steps of which size."""

    steps: Count = 1000
    """Optimizer steps of the whole run; the schedule ends here, or where the source ends before. 0: all that the source
    has."""
    batch_size: Positive = 8
    """Slots (samples) of the global batch of one step."""
    micro_batch_size: Count = 0
    """Samples computed at once; 0: the whole batch. Changes memory, not the result (beyond rounding)."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """The gradient's global norm is scaled down to this; 0: never."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    threads: Count = 0
    """CPU threads of one process; 0: all cores this process may use, shared among the workers of this machine."""
    non_finite: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is NaN or infinite: stop (the last good state is saved), or leave that step out."""
    non_finite_cap: Positive = 10
    """With `skip`: stop once more than this many steps had to be left out."""

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> TrainSettings:
        if self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch_size}) is larger than batch_size ({self.batch_size}): "
                f"use {self.batch_size} or less"
            )
        return self


class CheckpointSettings(Settings):
    """When to save, and what to keep."""

    every: Count = 200
    """Steps between saves; 0: only at the end and when interrupted."""
    keep_last: Positive = 2
    """Older checkpoints are removed once a newer one is safe."""
    keep_every: Count = 0
    """Checkpoints of steps divisible by this are never removed; 0: none."""
    asynchronous: bool = True
    """Write in the background: training waits only for a copy into host memory, which is as large as the state. False:
    no such memory is needed, and training waits for the disk."""
    second_copy: bool = True
    """Write each index twice, so that damage to one of the two loses nothing."""
    path: str = ""
    """Where to keep them: a folder, or a URL that fsspec opens (s3://bucket/run); empty: in the run's folder."""


class EvaluationSettings(Settings):
    """Loss on held-out data while training."""

    every: Count = 100
    """Steps between evaluations (one more at the end); 0: never."""
    batches: Count = 20
    """Batches of the validation split to average over; 0: all of it."""
    at_start: bool = False
    """Also evaluate the model as initialised."""
    held_out: dict[str, Annotated[SourceSettings, component("resilin.data.text_source:TextSource")]] = Field(
        default_factory=dict
    )
    """Further held-out data by name, beside the source's own: the validation split of each is evaluated and logged as
    `<name>/loss`."""

    @field_validator("held_out")
    @classmethod
    def _names(cls, value: dict[str, SourceSettings]) -> dict[str, SourceSettings]:
        for name in value:
            if name == "validation" or not _NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} names held-out data: use letters, digits, '-', '_' and '.', and not 'validation', which "
                    "is the source's own"
                )
        return value


class LogSettings(Settings):
    """Where the run's events go, beside `events.jsonl`, which is always written."""

    every: Positive = 1
    """Steps between step events."""
    tensorboard: bool = True
    live: bool = True
    """Progress in the terminal."""
    tracker: Literal["none", "wandb", "mlflow"] = "none"
    """An experiment tracker; the package must be installed."""
    project: str = "resilin"
    """The tracker's project or experiment."""


class RunSettings(Settings):
    """Everything a run is made of; `resilin train --print-config` writes it whole."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """The run's folder is runs/<name> unless --folder says otherwise."""
    seed: Count = 0
    """Decides data order, initial weights and every random choice."""
    source: Annotated[SourceSettings, component("resilin.data.text_source:TextSource")]
    model: Annotated[ModelSettings, component("resilin.models.decoder_settings:DecoderSettings")] = Field(
        default_factory=dict, validate_default=True
    )
    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    optimizer: Annotated[OptimizerSettings, component("resilin.optim.adamw:AdamW")] = Field(
        default_factory=dict, validate_default=True
    )
    train: TrainSettings = TrainSettings()
    memory: MemorySettings = MemorySettings()
    parallel: ParallelSettings = ParallelSettings()
    cluster: ClusterSettings = ClusterSettings()
    precision: PrecisionSettings = Field(default_factory=PrecisionSettings)
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    log: LogSettings = LogSettings()

    def default_folder(self) -> Path:
        """Where the run lives unless told otherwise."""
        return Path("runs") / self.name
