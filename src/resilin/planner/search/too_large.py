"""What is missing where no layout fits, and the smallest cluster that would do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from resilin.parallel.errors import ParallelError
from resilin.planner.cost import RESILIN, Memory, Stack, Workload, memory_of
from resilin.planner.hardware import Cluster
from resilin.planner.search.find import usable
from resilin.planner.search.space import Fixed, arrangements

MOST_WORKERS = 65_536


@dataclass(frozen=True)
class Missing:
    """Why nothing fits.

    Attributes:
        needed: the memory of the layout that needs least.
        plan: its name.
        limit: bytes that there are on a device.
        workers: the smallest number of such devices on which something fits; None: none is found.
        does: the layout that fits there.
        batch: rows of a step there, which so many workers divide.
    """

    needed: Memory
    plan: str
    limit: float
    workers: int | None
    does: str = ""
    batch: int = 0


def missing(
    work: Workload,
    cluster: Cluster,
    workers: int,
    least: tuple[Memory, str],
    fixed: Fixed = Fixed(),
    stack: Stack = RESILIN,
    device_type: str = "cuda",
) -> Missing:
    """What would be needed; the arguments are those of `find`, and the least that its search has seen.

    The search goes over whole nodes, doubling, then back to the smallest number that fits.
    """
    limit = usable(cluster, stack)
    node = max(cluster.node, 1)
    # What needs least has one row in a micro-batch, computes all it can again, and holds no chunks besides.
    small = replace(fixed, micro=fixed.micro or 1, recompute=fixed.recompute or "block")
    free = {name: value for name, value in small.parallel.items() if name != "data"}
    if "schedule" not in free and "chunks" not in free:
        free |= {"schedule": "1f1b", "chunks": 1}
    small = replace(small, parallel=free)

    def rows(count: int) -> int:
        return -(-work.batch // count) * count

    def fits(count: int) -> str | None:
        steps = work.with_batch(rows(count))
        for plan in arrangements(steps, cluster, count, small):
            try:
                if memory_of(steps, plan, stack, device_type, exact=False).total <= limit:
                    return str(plan)
            except ParallelError:
                continue
        return None

    count = max(-(-workers // node), 1) * node
    most = min(cluster.reach or MOST_WORKERS, MOST_WORKERS)
    found = fits(count) if workers < count <= most else None
    while count <= most and found is None:
        count *= 2
        found = fits(count) if count <= most else None
    if found is None:
        return Missing(*least, limit, None)
    low, high = count // 2, count
    while high - low > node:
        middle = (low + high) // 2 // node * node
        if middle <= low:
            break
        plan = fits(middle)
        if plan is None:
            low = middle
        else:
            high, found = middle, plan
    return Missing(*least, limit, high, found, rows(high))
