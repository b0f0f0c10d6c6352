"""Which mixtures of experts fit into device, host memory and disk (SE-MoE, Shen et al., 2022, section 3.1).

The paper's inequalities with the bytes that are really used: S parameters of all experts, D others, L layers with
experts, a share alpha of all experts active in a step, M_x bytes of a tier on each of N machines.
"""

from __future__ import annotations

from dataclasses import dataclass

from resilin.memory.expert_state import Record
from resilin.memory.expert_store import Geometry


@dataclass(frozen=True, slots=True)
class MoESize:
    """Attributes:
    dense: parameters that every step uses (D).
    layers: with experts (L).
    experts: of each layer.
    expert: state of one expert.
    dense_bytes: for each dense parameter: weight, gradient and two moments in float32.
    """

    dense: int
    layers: int
    experts: int
    expert: Record
    dense_bytes: int = 16

    @property
    def sparse(self) -> int:
        """Parameters of all experts (S)."""
        return self.layers * self.experts * self.expert.parameters


@dataclass(frozen=True, slots=True)
class Tier:
    """Attributes:
    name: of the tier.
    needed: bytes, over all machines.
    available: bytes, over all machines.
    """

    name: str
    needed: int
    available: int

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.needed <= self.available


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """Attributes:
    device: dense states; matrices of the active experts of the layers at hand, and gradients of one.
    host: states and gradients of the active experts.
    disk: two slots for every expert.
    most_experts: the largest number of experts per layer that fits, the rest being equal.
    bandwidth: bytes a second from disk that hide the reads of a step behind its computation.
    """

    device: Tier
    host: Tier
    disk: Tier
    most_experts: int
    bandwidth: float

    @property
    def binding(self) -> Tier:
        """The tier with the least room to spare."""
        return max((self.device, self.host, self.disk), key=lambda tier: tier.needed / max(tier.available, 1))

    @property
    def fits(self) -> bool:
        """Whether all tiers have room."""
        return self.binding.fits

    def check(self) -> None:
        """Refuse what does not fit.

        Raises:
            ValueError: naming the tier, what it needs and has, and what would fit.
        """
        tier = self.binding
        if not tier.fits:
            raise ValueError(
                f"the {tier.name} needs {tier.needed:,} bytes and has {tier.available:,}; "
                f"{self.most_experts} experts a layer would fit"
            )


def _tiers(size: MoESize, alpha: float, available: tuple[int, int, int], lookahead: int) -> list[Tier]:
    active = max(round(alpha * size.experts), 1)
    matrices = 4 * size.expert.parameters
    geometry = Geometry(size.layers, size.experts, size.expert.record_bytes)
    # A backward pass hands over one layer's gradients on the device; they are kept in host memory until the update.
    device = size.dense * size.dense_bytes + active * matrices * (1 + lookahead + 1)
    host = size.layers * active * (geometry.record_bytes + matrices)
    needs = device, host, geometry.disk_bytes
    return [Tier(*one) for one in zip(("device", "host", "disk"), needs, available, strict=True)]


def plan_capacity(
    size: MoESize,
    *,
    device: int,
    host: int,
    disk: int,
    alpha: float,
    machines: int = 1,
    step_seconds: float = 1.0,
    hit_rate: float = 0.0,
    lookahead: int = 1,
) -> CapacityPlan:
    """What each tier has to hold, and the largest number of experts that fits.

    Args:
        size: of the model.
        device: bytes of one machine's devices.
        host: bytes of one machine's host memory for experts.
        disk: bytes of one machine's disk.
        alpha: measured share of experts that a step uses (`TierReport.active`); near 1 tiers give nothing.
        machines: among which experts and dense states are divided.
        step_seconds: that a step computes.
        hit_rate: of the host cache, for the bandwidth.
        lookahead: layers read ahead; the paper's inequality has none.

    Raises:
        ValueError: alpha is no share, or not even one expert a layer fits; naming the tier and the bytes.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha ({alpha}) is the share of experts that a step uses: above 0, at most 1")
    available = device * machines, host * machines, disk * machines

    def fits(experts: int) -> list[Tier]:
        other = MoESize(size.dense, size.layers, experts, size.expert, size.dense_bytes)
        return _tiers(other, alpha, available, lookahead)

    lacking = [tier for tier in fits(1) if not tier.fits]
    if lacking:
        raise ValueError(
            f"not even one expert a layer fits: {lacking[0].name} needs {lacking[0].needed:,} bytes and has "
            f"{lacking[0].available:,}"
        )
    low, high = 1, 2
    while all(tier.fits for tier in fits(high)):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if all(tier.fits for tier in fits(middle)) else (low, middle)
    tiers = fits(size.experts)
    active = max(round(alpha * size.experts), 1) * size.layers
    reads = active * size.expert.record_bytes * (1 - hit_rate)
    on_device, on_host, on_disk = tiers
    return CapacityPlan(on_device, on_host, on_disk, most_experts=low, bandwidth=reads / step_seconds)
