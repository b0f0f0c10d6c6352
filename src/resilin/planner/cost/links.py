"""How long ranks take to exchange bytes, over levels of links.

Ranks are numbered as the runtime numbers them, tensor parallelism innermost, so that which links a group crosses
follows from how far apart its members are. Volumes are those of ring algorithms (Narayanan et al. 2021, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from resilin.parallel.degrees import AXES, Degrees
from resilin.planner.hardware import Cluster


@dataclass(frozen=True, slots=True)
class Span:
    """A group of ranks at equal distances.

    Attributes:
        size: how many.
        stride: from one to the next, in ranks.
    """

    size: int
    stride: int = 1


def span_of(degrees: Degrees, *axes: str) -> Span:
    """The group of neighbouring axes of the mesh, such as ("dp", "cp"); the innermost of them decides the distance."""
    order = [(axis, getattr(degrees, name)) for name, axis in AXES.items()]
    inner = max(position for position, (axis, _) in enumerate(order) if axis in axes)
    stride, size = 1, 1
    for position, (axis, count) in enumerate(order):
        if position > inner:
            stride *= count
        elif axis in axes:
            size *= count
    return Span(size, stride)


def _crossings(cluster: Cluster, span: Span) -> list[tuple[int, int, float, float]]:
    """(members inside one unit of the level below, inside one of this level, bandwidth, latency) of levels crossed."""
    found, inside = [], 1
    for level in cluster.levels:
        reach = level.devices or span.size * span.stride
        within = max(inside, min(span.size, -(-reach // span.stride) if reach >= span.stride else 1))
        if within > inside:
            found.append((inside, within, level.bandwidth * cluster.efficiency.links, level.latency))
        inside = within
    return found


def gather_seconds(cluster: Cluster, span: Span, total: float) -> float:
    """All-gather, or reduce-scatter, of so many bytes put together: each rank ends, or begins, with all of them."""
    if span.size == 1 or not total:
        return 0.0
    crossed = _crossings(cluster, span)
    share = (span.size - 1) / span.size * total
    # Members inside one unit share the outer links of all of them.
    slowest = max(share / (inside * bandwidth) for inside, _, bandwidth, _ in crossed)
    return slowest + sum((within // inside - 1) * latency for inside, within, _, latency in crossed)


def in_one_memory(cluster: Cluster, span: Span) -> bool:
    """Whether a group's ranks see the same memory."""
    reach, inner = (span.size - 1) * span.stride + 1, cluster.levels[0]
    return inner.shared and (not inner.devices or reach <= inner.devices)


def agreement_seconds(cluster: Cluster, span: Span) -> float:
    """Until all ranks of a group know that all have come."""
    return 2 * (span.size - 1) * cluster.levels[0].latency


def all_reduce_seconds(cluster: Cluster, span: Span, bytes_each: float) -> float:
    """A sum of so many bytes at each rank, which all of them end with."""
    return 2 * gather_seconds(cluster, span, bytes_each)


def all_to_all_seconds(cluster: Cluster, span: Span, bytes_each: float) -> float:
    """Each rank sends an equal part of so many bytes to every other one."""
    if span.size == 1 or not bytes_each:
        return 0.0
    crossed = _crossings(cluster, span)
    slowest = max(bytes_each * (span.size - inside) / span.size / bandwidth for inside, _, bandwidth, _ in crossed)
    return slowest + max(latency for *_, latency in crossed)


def message_seconds(cluster: Cluster, stride: int, count: float) -> float:
    """A message of so many bytes between ranks that are so far apart, while all others do the same."""
    for level in cluster.levels:
        if not level.devices or stride < level.devices:
            return count / (level.bandwidth * cluster.efficiency.links) + level.latency
    level = cluster.levels[-1]
    return count / (level.bandwidth * cluster.efficiency.links) + level.latency


def slowest_level(cluster: Cluster, span: Span) -> str:
    """The name of the links that decide how long the group takes."""
    crossed = _crossings(cluster, span)
    if not crossed:
        return ""
    worst = max(range(len(crossed)), key=lambda i: 1 / (crossed[i][0] * crossed[i][2]))
    bandwidth = crossed[worst][2]
    return next(one.name for one in cluster.levels if one.bandwidth * cluster.efficiency.links == bandwidth)
