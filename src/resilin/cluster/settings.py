"""`[cluster]`: workers that come and go while a run goes on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from resilin.config import Settings

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class ClusterSettings(Settings):
    """How a run lives through changes of its workers."""

    elastic: bool = False
    """Go on when workers are lost, leave or come: with `--workers N`, data parallelism and a `train.micro_batch_size`.
    Off: the first worker that fails ends the run."""
    launcher: Literal["local", "ray"] = "local"
    """Who starts workers: `local`, processes of this machine; `ray`, actors on the nodes of a Ray cluster."""
    most: Annotated[int, Field(ge=0)] = 0
    """With Ray: how many workers to have as soon as nodes have room; 0: as many as begin."""
    placement: Literal["SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK"] = "SPREAD"
    """With Ray: how the workers that begin are put on nodes."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """With Ray: CPUs of a node for each worker."""
    least: Positive = 1
    """Below how many workers the run ends."""
    replace: bool = False
    """Start another worker for each one that is lost."""
    copies: Positive = 1
    """Of every worker's weights and optimizer states, in others' memory: so many neighbours may be lost at once."""
    silence: Seconds = 10.0
    """Seconds without a sign of life after which a worker counts as lost. One that ends is noticed at once."""
    hang: Seconds = 600.0
    """Seconds that a worker may be busy with one thing, waiting for nobody, before it counts as lost."""
    notice: str = ""
    """Where a machine says that it will be taken away, so that its workers leave in time: `aws`, `gcp`, `azure`; a URL
    that answers 200 then, and 404 before; the path of a file that appears; or `package.module:function`."""
    notice_every: Seconds = 5.0
    """Seconds between two looks there."""
    clocks: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """With pipeline stages: clocks that the workers' devices can be set to, the usual one first, of any unit. A stage
    that lost workers is planned to get the smallest at which the others do not wait for it."""
    clocks_fixed: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of a stage's time that no clock shortens."""
    clocks_hook: str = ""
    """`package.module:function` that is handed the clocks of all stages when they are to change, and sets them. Empty:
    they are only told in the log."""
    host: str = ""
    """Address at which the coordinator listens. Empty: the loopback, where all workers are on its machine; all
    addresses, where torchrun or Slurm have started some elsewhere."""
    port: Annotated[int, Field(ge=0, lt=65536)] = 0
    """Port at which it listens; 0: one that is free."""

    @model_validator(mode="after")
    def _ray_has_what_it_needs(self) -> ClusterSettings:
        if self.launcher == "ray" and not self.elastic:
            raise ValueError('launcher = "ray" starts workers that may come and go: set elastic = true')
        if self.most and self.launcher != "ray":
            raise ValueError('most is how many workers Ray may start as nodes come: it needs launcher = "ray"')
        if self.most and self.most < self.least:
            raise ValueError(f"most ({self.most}) is less than least ({self.least})")
        return self

    @model_validator(mode="after")
    def _clocks_are_known(self) -> ClusterSettings:
        if self.clocks_hook and not self.clocks:
            raise ValueError("clocks_hook is there, and no clocks to hand over: name those that can be set with clocks")
        return self
