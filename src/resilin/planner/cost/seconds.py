"""Seconds by what they are spent on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one pass, or of several.

    Attributes:
        products: matrix products.
        attention: fused attention.
        traffic: between device and memory, beside products, and the launching of operations.
        tensor: sums over tensor parallelism.
        context: exchange over context parallelism.
        expert: exchange over expert parallelism.
        data: FSDP's gathers and sums.
        offload: waiting for host memory or disk.
    """

    products: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    data: float = 0.0
    offload: float = 0.0

    @property
    def total(self) -> float:
        """Of everything."""
        return self.computing + self.tensor + self.context + self.expert + self.data + self.offload

    @property
    def computing(self) -> float:
        """Of what is not communication."""
        return self.products + self.attention + self.traffic

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.products + other.products,
            self.attention + other.attention,
            self.traffic + other.traffic,
            self.tensor + other.tensor,
            self.context + other.context,
            self.expert + other.expert,
            self.data + other.data,
            self.offload + other.offload,
        )

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(
            self.products * factor,
            self.attention * factor,
            self.traffic * factor,
            self.tensor * factor,
            self.context * factor,
            self.expert * factor,
            self.data * factor,
            self.offload * factor,
        )
