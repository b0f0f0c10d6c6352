"""What tiers of memory took and did."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from resilin.memory.expert_layer import common_shape
from resilin.memory.expert_store import Geometry
from resilin.memory.expert_updates import ExpertUpdates
from resilin.memory.settings import ExpertTiers
from resilin.models.moe import Experts
from resilin.optim.settings import OptimizerSettings


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


def planned_bytes(
    tiers: ExpertTiers, optimizer: OptimizerSettings, outline: nn.Module, total_steps: int, workers: int = 1
) -> dict[str, int]:
    """The most bytes that each tier of a worker will hold, by words for people; nothing is made.

    Args:
        tiers: of the run, like what follows.
        optimizer: whose moments are kept.
        outline: its whole model, on any device.
        total_steps: that it takes.
        workers: among whom the experts are divided.

    Raises:
        UserError: what cannot live in tiers, and why.
    """
    modules = {name: module for name, module in outline.named_modules() if isinstance(module, Experts)}
    shape, experts, _ = common_shape(modules)
    prefix = next(iter(modules))
    names = {short: f"{prefix}.{short}" if prefix else short for short in shape.names}
    record = ExpertUpdates(optimizer, outline, total_steps, names, shape).record
    mine = -(-experts // workers)
    geometry = Geometry(len(modules), mine, record.record_bytes, slots=1)
    states, matrices = len(modules) * mine, 4 * shape.parameters
    return {
        "disk": geometry.disk_bytes,
        "host, cache": min(tiers.host_bytes, states * record.record_bytes) + 3 * record.record_bytes,
        "host, gradients": states * matrices,
        "device": (tiers.device_layers + 1) * mine * matrices,
    }
