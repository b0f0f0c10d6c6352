"""A kind of machine, as a plan sees it. Units are SI: bytes, bytes a second, seconds, watts, FLOP/s."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from resilin.config import Settings, UserError

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(gt=0)]
Compute = Literal["fp32", "tf32", "bf16", "fp16", "fp8"]


class Device(Settings):
    """One device: a GPU, a die of one where each is a device of its own, or a core of a CPU."""

    name: str
    memory: Positive
    """Bytes that a process can use."""
    bandwidth: Positive
    """Bytes a second between the device and its memory."""
    peak: dict[Compute, Positive]
    """FLOP/s of dense matrix products by the format of their inputs."""
    units: Count = 1
    """Units (SMs, CUs) that each compute a tile of a product at a time; the last round of tiles may leave some idle."""
    tile: tuple[Count, Count] = (1, 1)
    """Rows and columns of a tile; with one unit it has no meaning."""
    launch: NotNegative = 0.0
    """Seconds that one operation takes besides its work."""

    @model_validator(mode="after")
    def _has_a_peak(self) -> Self:
        if not self.peak:
            raise ValueError("peak names no format: give at least one, such as peak.bf16 = 312e12")
        return self


class Level(Settings):
    """Links that join devices, or groups of them that an inner level joins."""

    name: str
    devices: Annotated[int, Field(ge=0)] = 0
    """How many devices it joins altogether; 0: any number (the outermost only)."""
    bandwidth: Positive
    """Bytes a second that each device sends, while all of them send and receive at once."""
    latency: NotNegative = 0.0
    """Seconds of one message."""
    shared: bool = False
    """Whether it joins cores of one machine, whose processes see the same memory: there gradients and weights of data
    parallelism are not sent."""


class Efficiency(Settings):
    """Which share of the devices' numbers a model reaches: calibrated on one run, or measured here."""

    products: Share = 1.0
    """Of the peak, by large matrix products."""
    attention: Share = 1.0
    """Of the peak, by fused attention."""
    bandwidth: Share = 1.0
    """Of the memory's bandwidth, by what is no product."""
    links: Share = 1.0
    """Of the levels' bandwidth, by collectives."""
    source: str = ""
    """Where these come from."""


class Disk(Settings):
    """Where checkpoints go, for each device while all of them write or read."""

    read: Positive
    """Bytes a second."""
    write: Positive
    """Bytes a second."""


class Host(Settings):
    """What belongs to a device of its machine's own memory."""

    memory: Positive
    """Bytes."""
    bandwidth: Positive
    """Bytes a second between host and device, each way."""


class Price(Settings):
    """What a device costs."""

    device_hour: NotNegative
    """For one hour."""
    currency: str = "USD"
    source: str = ""
    """Where and when it was asked for."""


class Power(Settings):
    """What a device draws, its part of machine and cooling included."""

    busy: Positive
    """Watts while it computes."""
    idle: NotNegative = 0.0
    """Watts while it waits."""


class Failures(Settings):
    """How often devices fail: exponential times with these means."""

    device_hours: Positive
    """Hours that one device runs on the mean between two failures that interrupt a run."""
    restart: NotNegative = 0.0
    """Seconds from a failure until training goes on, where it is restarted from a checkpoint."""
    source: str = ""


class Cluster(Settings):
    """A kind of machine, and as many devices of it as are asked for."""

    name: str
    sources: tuple[str, ...] = ()
    """Where the numbers come from."""
    device: Device
    levels: Annotated[tuple[Level, ...], Field(min_length=1)]
    """From the links that are nearest to a device to the outermost."""
    workers: Annotated[int, Field(ge=0)] = 0
    """How many devices there are; 0: as many as are asked for."""
    efficiency: Efficiency = Efficiency()
    disk: Disk | None = None
    host: Host | None = None
    price: Price | None = None
    power: Power | None = None
    failures: Failures | None = None

    @model_validator(mode="after")
    def _levels_grow(self) -> Self:
        for inner, outer in zip(self.levels, self.levels[1:], strict=False):
            if inner.devices == 0:
                raise ValueError(f"level {inner.name!r} joins any number of devices: only the outermost can")
            if outer.devices and (outer.devices <= inner.devices or outer.devices % inner.devices):
                raise ValueError(
                    f"level {outer.name!r} joins {outer.devices} devices, which should be a multiple of the "
                    f"{inner.devices} that level {inner.name!r} joins"
                )
        if self.workers and self.reach and self.workers > self.reach:
            raise ValueError(f"workers is {self.workers}, but the outermost level joins {self.reach} devices")
        return self

    @property
    def reach(self) -> int:
        """Devices that the outermost level joins; 0: any number."""
        return self.levels[-1].devices

    @property
    def node(self) -> int:
        """Devices of one machine: what all levels but the outermost join; all of them where there is one level."""
        return self.levels[-2].devices if len(self.levels) > 1 else self.levels[-1].devices or 1

    def peak(self, compute: str) -> float:
        """FLOP/s of products in a format.

        Raises:
            UserError: the device is not known to compute in it.
        """
        found = self.device.peak.get(compute)  # type: ignore[call-overload]
        if found is None:
            raise UserError(
                f"{self.device.name} has no peak for {compute}: its file names {', '.join(self.device.peak)}; use one "
                f"of them, or add device.peak.{compute}"
            )
        return float(found)

    def failure_rate(self, devices: int) -> float | None:
        """Failures a second among so many devices; None where the file does not say."""
        return None if self.failures is None else devices / (self.failures.device_hours * 3600)

    def cost(self, devices: int, seconds: float) -> float | None:
        """Of so many devices for so long, in the price's currency; None where the file has no price."""
        return None if self.price is None else devices * seconds / 3600 * self.price.device_hour

    def energy(self, devices: int, seconds: float, busy: float = 1.0) -> float | None:
        """Joules of so many devices for so long, busy for a share of it; None where the file has no power."""
        if self.power is None:
            return None
        return devices * seconds * (busy * self.power.busy + (1 - busy) * self.power.idle)
