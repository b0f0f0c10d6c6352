"""The file of a study of long runs: cluster, job, checkpoints, failures, and ways to go on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from resilin.config import Settings
from resilin.planner.long_run.draw import Failures

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]

WayName = Literal[
    "restart",
    "spares",
    "torchft",
    "recycle",
    "oobleck",
    "elaswave-dataflow",
    "elaswave-layers",
    "elaswave-clocks",
    "elaswave",
    "resilin",
    "resilin-fast",
]


class ClusterSettings(Settings):
    """The machines."""

    machines: Count
    """That compute."""
    machine: str = ""
    """Which kind, by name or file as for `resilin plan --cluster`: gives devices, price, watts, how often machines fail
    and how long a restart takes, wherever this file does not."""
    devices: Count = 8
    """Workers on each."""
    spares: Annotated[int, Field(ge=0)] = 0
    """Machines besides, that wait until one is lost."""
    price: Share = 0.0
    """Of a device for an hour, in any currency."""
    pay: Literal["always", "present"] = "always"
    """Whether machines are paid for while they are away (owned, reserved) or not (spot)."""
    watts: Share = 0.0
    """Of a device that computes."""
    idle_watts: Share = 0.0
    """Of one that is there and does not."""

    @model_validator(mode="after")
    def _watts(self) -> ClusterSettings:
        if self.idle_watts > self.watts:
            raise ValueError(
                f"idle_watts ({self.idle_watts:g}) are more than watts ({self.watts:g}) of a device at work"
            )
        return self


class JobSettings(Settings):
    """What is trained, and how it is divided."""

    stages: Count = 1
    """Of the pipeline."""
    tensor: Count = 1
    """Devices that share every layer; those of one machine."""
    micro_batches: Count = 8
    """Of each replica in a step, when nobody is missing."""
    micro_batch: Count = 1
    """Samples of each: into so many parts it can be cut."""
    layers: Count | tuple[Positive, ...] = 32
    """How many alike, or the cost of each in any unit."""
    head: Share = 0.0
    """Cost of what follows the last layer, in the same unit (layers alike cost 1)."""
    step_seconds: Positive
    """Of a step when nobody is missing."""
    steps: Count | None = None
    """Of the run; or `days`."""
    days: Positive | None = None
    """That the run would take if nothing happened."""
    move_seconds: Share = 1.0
    """Until layers that change their stage are where they are to be."""
    clocks: tuple[Positive, ...] = ()
    """That devices can be set to, the usual one first; (): none can be set."""
    clocks_fixed: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of a stage's time that no clock shortens."""
    measured: dict[str, Positive] = Field(default={})
    """Seconds of a step that were measured with some numbers of replicas, by number; straight in log-log between. For
    runs without stages; in place of the schedule's own forecast."""
    least: Count = 1
    """With `measured`: replicas below which nothing can run."""

    @model_validator(mode="after")
    def _length(self) -> JobSettings:
        if (self.steps is None) == (self.days is None):
            raise ValueError("give either steps, or the days that the run would take if nothing happened")
        if strange := [key for key in self.measured if not key.isdecimal() or not int(key)]:
            raise ValueError(f"measured names numbers of replicas, such as 4, not {strange[0]!r}")
        if self.measured and self.stages > 1:
            raise ValueError("measured step times are of runs without stages: set stages = 1, or leave measured out")
        if self.least > 1 and not self.measured:
            raise ValueError("least goes with measured step times: leave it out, or give them")
        if len(self.measured) == 1:
            raise ValueError("measured step times are needed of two numbers of replicas at least")
        return self

    @property
    def costs(self) -> tuple[float, ...]:
        """Of each layer."""
        return (1.0,) * self.layers if isinstance(self.layers, int) else self.layers


class CheckpointSettings(Settings):
    """Saving, and beginning again."""

    seconds: Share = 30.0
    """For which the run stands still to be saved."""
    restart_seconds: Share = 600.0
    """From a loss until the first step after a restart: noticing, placing, starting, loading."""
    every: Positive = 14400.0
    """Seconds of work between two checkpoints for ways that need them seldom; `interval` of a way overrides it."""


class RecoverySettings(Settings):
    """What ways that go on from memory are all taken to need, so that they differ by what they do."""

    seconds: Share = 10.0
    """From a loss until the others go on."""
    join_seconds: Share = 10.0
    """For which all stand when somebody comes."""
    copies: Annotated[int, Field(ge=0)] = 1
    """Of every machine's states in others' memory, where a way keeps copies."""


class WaySettings(Settings):
    """One way to go on."""

    use: WayName
    """`restart`: from a checkpoint. `spares`: some replicas wait for the loss of others. `torchft`: without the
    replicas that lost somebody. `recycle`: their micro-batches go whole to others of their stage. `oobleck`: pipelines
    made anew from templates. `elaswave-...`: one axis of its scheduler; `elaswave`: all. `resilin`: an elastic run with
    the same bits; `resilin-fast`: one that cuts micro-batches."""
    interval: Positive | Literal["young", "daly", "least", "none"] | None = None
    """Seconds of work between two checkpoints; by Young or Daly; `least`: where the expected time is least."""
    seconds: Share | None = None
    """In place of `recovery.seconds` (of `restart`: `checkpoint.restart_seconds`)."""
    join_seconds: Share | None = None
    """In place of `recovery.join_seconds`."""
    redo: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the step under way that is computed again."""
    fewer: bool = False
    """`restart` only: go on with as many whole replicas as there are, instead of waiting for machines."""
    spare: Count = 1
    """`spares` only: replicas (on as many machines of each stage) that wait; the others compute the whole batch."""
    least: Count = 1
    """`torchft` only: whole replicas (on as many machines) below which the run stands."""
    shortest: Count | None = None
    """`oobleck` only: machines that a pipeline needs at least. Default: half of the stages."""

    @model_validator(mode="after")
    def _belongs(self) -> WaySettings:
        for name, way, default in (
            ("fewer", "restart", False),
            ("spare", "spares", 1),
            ("least", "torchft", 1),
            ("shortest", "oobleck", None),
        ):
            if getattr(self, name) != default and self.use != way:
                raise ValueError(f"{name} belongs to use = {way!r}, not to {self.use!r}")
        return self


WAYS: dict[str, WaySettings] = {
    "restart, waiting": WaySettings(use="restart", interval="daly"),
    "restart, hourly": WaySettings(use="restart", interval=3600.0, fewer=True),
    "restart, Young": WaySettings(use="restart", interval="young", fewer=True),
    "restart, Daly": WaySettings(use="restart", interval="daly", fewer=True),
    "spare replica": WaySettings(use="spares"),
    "torchft": WaySettings(use="torchft"),
    "Oobleck": WaySettings(use="oobleck"),
    "ReCycle": WaySettings(use="recycle"),
    "ElasWave: dataflow": WaySettings(use="elaswave-dataflow"),
    "ElasWave: layers": WaySettings(use="elaswave-layers"),
    "ElasWave: clocks": WaySettings(use="elaswave-clocks"),
    "ElasWave": WaySettings(use="elaswave"),
    "Resilin": WaySettings(use="resilin"),
    "Resilin, fast sums": WaySettings(use="resilin-fast"),
}
"""What is compared where a file names no ways."""


class StudySettings(Settings):
    """A whole file."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of the failures that are drawn."""
    cluster: ClusterSettings
    job: JobSettings
    checkpoint: CheckpointSettings = CheckpointSettings()
    recovery: RecoverySettings = RecoverySettings()
    failures: Failures = Failures()
    trace: Path | None = None
    """A file of failures, in place of drawing them; relative to the folder the command is given in."""
    give_up: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0
    """A run is given up after so many times what it would take if nothing happened."""
    ways: dict[str, WaySettings] = Field(default=WAYS)
    """By name."""

    @model_validator(mode="after")
    def _fits(self) -> StudySettings:
        cluster, job = self.cluster, self.job
        if cluster.devices % job.tensor:
            raise ValueError(
                f"job.tensor ({job.tensor}) does not divide cluster.devices ({cluster.devices}): layers are shared by "
                "devices of one machine"
            )
        if cluster.machines % job.stages:
            raise ValueError(
                f"cluster.machines ({cluster.machines}) is not divisible by job.stages ({job.stages}): every machine "
                f"holds one stage; use {cluster.machines // job.stages * job.stages or job.stages} or "
                f"{(cluster.machines // job.stages + 1) * job.stages} machines"
            )
        if job.stages > len(job.costs):
            raise ValueError(f"job.stages ({job.stages}) are more than the {len(job.costs)} layers")
        if self.trace is not None and self.failures != Failures():
            raise ValueError("failures come either from a trace or from laws: give one of trace and [failures]")
        if not self.ways:
            raise ValueError("ways is empty: name one, or leave the table out to compare all there are")
        return self

    @property
    def replicas(self) -> int:
        """Of each stage."""
        return self.cluster.machines // self.job.stages * self.members

    @property
    def members(self) -> int:
        """Replicas of a stage on one machine."""
        return self.cluster.devices // self.job.tensor

    @property
    def workers(self) -> int:
        """Devices that compute."""
        return self.cluster.machines * self.cluster.devices

    @property
    def steps(self) -> float:
        """Of the run."""
        if self.job.steps is not None:
            return float(self.job.steps)
        assert self.job.days is not None
        return max(math.ceil(self.job.days * 86400 / self.job.step_seconds), 1)
