"""What tiers of memory took and did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierReport:
    """Attributes:
    disk_bytes: of the store's files.
    host_bytes: the most that buffers of states took.
    gradient_bytes: the most that experts' gradients took in host memory.
    device_bytes: the most that experts' matrices and their gradients took on the device.
    hit_rate: of requests for states.
    stall_s: seconds that computation waited for the disk.
    read_bytes: from disk.
    written_bytes: to disk.
    active: mean share of experts that a step used.
    """

    disk_bytes: int
    host_bytes: int
    gradient_bytes: int
    device_bytes: int
    hit_rate: float
    stall_s: float
    read_bytes: int
    written_bytes: int
    active: float

    def as_logs(self) -> dict[str, float]:
        """All by name, but for seconds."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "stall_s"}
