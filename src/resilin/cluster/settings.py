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
