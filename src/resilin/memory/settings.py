"""The settings of a run's memory: what of a model does not stay where it is computed."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from resilin.config import Settings
from resilin.memory.cache_policy import Kind


class ExpertTiers(Settings):
    """Where a mixture's experts live: all on disk, some in host memory, those at work on the device."""

    folder: Path | None = None
    """Where files of the lowest tier go; none: into the run's folder. They are scratch: checkpoints hold the state."""
    host_bytes: int = Field(default=1 << 30, gt=0)
    """Of each worker's cache of whole states (weights and what the optimizer keeps) in host memory."""
    device_layers: int = Field(default=2, ge=1)
    """Layers whose used experts may lie on the device at once; 2: one that is computed and one ahead."""
    policy: Kind = "lru"
    """Who leaves the cache: the state that was used least recently, which suits training, or least often (lfu)."""
    threshold: float = Field(default=1.0, ge=0)
    """Hits below which lfu spares a state; above 1 it protects newcomers."""
    period: int = Field(default=100, ge=1)
    """Requests between decays of lfu's hits."""
    decay: float = Field(default=0.5, gt=0, le=1)
    """What its hits are multiplied by."""
    prefetch: bool = True
    """Whether states of the next layer are read ahead."""
    megabytes_per_second: float | None = Field(default=None, gt=0)
    """Slow the disk down to this, to stand in for another one; none: as it is."""


class MemorySettings(Settings):
    """What of a model lives elsewhere than on the device; an empty table takes its defaults, none keeps all there."""

    experts: ExpertTiers | None = None
    """Experts and their optimizer's states on disk, in host memory and on the device: `[memory.experts]`."""
