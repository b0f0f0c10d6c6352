"""How long a device takes for a product, and for traffic with its memory (a roofline with rounds of tiles)."""

from __future__ import annotations

from dataclasses import dataclass

from resilin.planner.hardware import Cluster

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
"""Of one value of an activation, by what products are computed in."""


@dataclass(frozen=True, slots=True)
class Product:
    """(rows, inner) @ (inner, columns), so many times.

    Attributes:
        rows: of the left matrix.
        inner: what is summed over.
        columns: of the right matrix.
        count: how many such products.
    """

    rows: float
    inner: float
    columns: float
    count: float = 1

    @property
    def flops(self) -> float:
        """Operations, a multiply-add as two."""
        return 2 * self.rows * self.inner * self.columns * self.count

    @property
    def backward(self) -> tuple[Product, Product]:
        """The products that give the gradients by the left and by the right matrix."""
        return (
            Product(self.rows, self.columns, self.inner, self.count),
            Product(self.inner, self.rows, self.columns, self.count),
        )


def product_seconds(cluster: Cluster, product: Product, compute: str) -> float:
    """Of one product on one device."""
    device, efficiency = cluster.device, cluster.efficiency
    if not product.flops:
        return 0.0
    tiles = max(product.rows / device.tile[0], 1) * max(product.columns / device.tile[1], 1) * product.count
    rounds = max(-(-tiles // device.units), 1)
    # A last round of few tiles takes as long as a full one; of small products, tiles shrink to fill the units.
    filled = max(tiles / (rounds * device.units), 0.5) if device.units > 1 else 1.0
    computing = product.flops / (cluster.peak(compute) * efficiency.products * filled)
    size = BYTES[compute] * (0.5 if compute == "fp8" else 1)
    moved = product.rows * product.inner + product.inner * product.columns + product.rows * product.columns
    moving = moved * product.count * size / (device.bandwidth * efficiency.bandwidth)
    return max(computing, moving) + device.launch


def attention_seconds(cluster: Cluster, flops: float, compute: str) -> float:
    """Of fused attention with so many operations; formats of less than 16 bits are not used in it."""
    if not flops:
        return 0.0
    kind = "bf16" if compute == "fp8" else compute
    return flops / (cluster.peak(kind) * cluster.efficiency.attention) + cluster.device.launch


def traffic_seconds(cluster: Cluster, count: float) -> float:
    """Of so many bytes between a device and its memory."""
    return count / (cluster.device.bandwidth * cluster.efficiency.bandwidth)
