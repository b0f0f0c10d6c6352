"""`[cluster]`: workers that come and go while a run goes on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from resilin.config import Settings

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class ClusterSettings(Settings):
    """How a run lives through changes of its workers."""

    elastic: bool = False
    """Go on when workers are lost, leave or come: with `--workers N`, data parallelism and a `train.micro_batch_size`.
    Off: the first worker that fails ends the run."""
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
    host: str = ""
    """Address at which the coordinator listens. Empty: the loopback, where all workers are on its machine; all
    addresses, where torchrun or Slurm have started some elsewhere."""
    port: Annotated[int, Field(ge=0, lt=65536)] = 0
    """Port at which it listens; 0: one that is free."""
