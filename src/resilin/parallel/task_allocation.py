"""How many devices each of several unequal tasks gets (SE-MoE, Shen et al., 2022, section 3.2: elastic training).

A step lasts as long as its slowest device. Heavy tasks are divided among several devices, light ones share one. Pure.
Shapes: K tasks, G devices; w_k the workload of a task, g_k its devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Allocation:
    """Attributes:
    devices: for each task the devices that compute it, in order: several of its own, or one that it may share.
    """

    devices: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """G."""
        return 1 + max(device for own in self.devices for device in own)

    def loads(self, work: Sequence[float]) -> list[float]:
        """What each device computes, where a task's workload is divided evenly."""
        loads = [0.0] * self.size
        for own, load in zip(self.devices, work, strict=True):
            for device in own:
                loads[device] += load / len(own)
        return loads

    def bound(self, work: Sequence[float]) -> float:
        """The load of the busiest device: a step cannot be shorter."""
        return max(self.loads(work))

    def utilisation(self, work: Sequence[float]) -> float:
        """The share of all devices' time in which they compute."""
        return sum(work) / (self.size * self.bound(work))

    def share(self, task: int, device: int, samples: int) -> range:
        """The samples of a task that a device computes: a run, of lengths that differ by one at most."""
        own = self.devices[task]
        if device not in own:
            return range(0)
        place, (each, more) = own.index(device), divmod(samples, len(own))
        begin = place * each + min(place, more)
        return range(begin, begin + each + (place < more))


def allocate(work: Sequence[float], devices: int) -> Allocation:
    """The allocation with the smallest bound.

    With as many devices as tasks, or more: one each, and every further one to the task with the largest w_k / g_k,
    which is optimal. With fewer: the largest task first, each to the device with the least load, then tasks are moved
    and swapped away from the busiest device as long as that helps.

    Args:
        work: of each task, above 0.
        devices: G.

    Raises:
        ValueError: there are no tasks, no devices, or a workload that is not above 0.
    """
    if not work or devices < 1 or min(work) <= 0:
        raise ValueError(f"{devices} devices for workloads {list(work)}: both are needed, and workloads above 0")
    if devices < len(work):
        return _pack(work, devices)
    counts = [1] * len(work)
    for _ in range(devices - len(work)):
        counts[max(range(len(work)), key=lambda k: work[k] / counts[k])] += 1
    ends = [sum(counts[: k + 1]) for k in range(len(work))]
    return Allocation(tuple(tuple(range(end - count, end)) for end, count in zip(ends, counts, strict=True)))


def _pack(work: Sequence[float], devices: int) -> Allocation:
    loads, where = [0.0] * devices, [0] * len(work)
    for task in sorted(range(len(work)), key=lambda k: -work[k]):
        where[task] = min(range(devices), key=loads.__getitem__)
        loads[where[task]] += work[task]
    while _improve(work, loads, where):
        pass
    return Allocation(tuple((device,) for device in where))


def _improve(work: Sequence[float], loads: list[float], where: list[int]) -> bool:
    """One move or swap that makes the busiest device, and the one it exchanges with, less busy than it was."""
    worst = max(range(len(loads)), key=loads.__getitem__)
    for task in [k for k in range(len(work)) if where[k] == worst]:
        for other in range(len(loads)):
            for back in [None, *(k for k in range(len(work)) if where[k] == other)]:
                shift = work[task] - (0.0 if back is None else work[back])
                if other == worst or shift <= 0 or loads[other] + shift >= loads[worst]:
                    continue
                loads[worst] -= shift
                loads[other] += shift
                where[task] = other
                if back is not None:
                    where[back] = worst
                return True
    return False


@dataclass
class TaskAllocator:
    """Plans devices for tasks, and plans again when what is measured says that it pays.

    Attributes:
        samples: of each task in a step.
        min_devices: the fewest that may be used.
        max_devices: the most.
        mode: "throughput": the smallest bound, with the fewest devices that reach it; "cost": the highest utilisation,
            with the fewest devices. Neither grows evenly with devices: every number is tried.
        interval: steps between looks.
        smoothing: the share of the newest measurement in the average.
        gain: a new plan has to shorten the step by more than this share.
        horizon: steps that a new plan is expected to serve.
        migration_seconds: what a change costs.
    """

    samples: tuple[int, ...]
    min_devices: int
    max_devices: int
    mode: Literal["throughput", "cost"] = "throughput"
    interval: int = 100
    smoothing: float = 0.2
    gain: float = 0.05
    horizon: int = 1000
    migration_seconds: float = 10.0
    costs: list[float] = field(init=False)
    """Seconds for one sample of each task, on average."""
    current: Allocation = field(init=False)
    history: list[tuple[int, Allocation]] = field(init=False)
    """Plans, and the steps at which they were made."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_devices <= self.max_devices:
            raise ValueError(f"{self.min_devices} to {self.max_devices} devices: the first should be 1 to the second")
        self.costs = [1.0] * len(self.samples)
        self.current = self.best()
        self.history = [(0, self.current)]
        self._measured = False

    @property
    def work(self) -> list[float]:
        """Seconds of one device for each task's samples."""
        return [samples * cost for samples, cost in zip(self.samples, self.costs, strict=True)]

    def best(self) -> Allocation:
        """The best plan for what is known now."""
        work = self.work
        plans = [allocate(work, count) for count in range(self.min_devices, self.max_devices + 1)]
        if self.mode == "throughput":
            return min(plans, key=lambda plan: (round(plan.bound(work), 12), plan.size))
        return max(plans, key=lambda plan: (round(plan.utilisation(work), 12), -plan.size))

    def observe(self, seconds: Sequence[float]) -> None:
        """Note what a step took.

        Args:
            seconds: of computing each task, summed over its devices.
        """
        found = [taken / samples for taken, samples in zip(seconds, self.samples, strict=True)]
        share = self.smoothing if self._measured else 1.0
        self.costs = [(1 - share) * old + share * new for old, new in zip(self.costs, found, strict=True)]
        self._measured = True

    def replan(self, step: int) -> Allocation | None:
        """A new plan, where it is time to look and a change pays; it is then the current one.

        Args:
            step: steps done.
        """
        if step == 0 or step % self.interval:
            return None
        plan, work = self.best(), self.work
        if plan == self.current:
            return None
        if self.mode == "cost":
            better = plan.utilisation(work) > self.current.utilisation(work) * (1 + self.gain)
        else:
            saved = self.current.bound(work) - plan.bound(work)
            better = saved > self.gain * self.current.bound(work) and saved * self.horizon > self.migration_seconds
        if not better:
            return None
        self.current = plan
        self.history.append((step, plan))
        return plan
