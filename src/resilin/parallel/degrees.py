"""Degrees of parallelism, and the meshes of ranks they make (TorchTitan, Liang et al., 2024, section 2).

Ranks are numbered with the pipeline outermost and tensor parallelism innermost: those that talk most are neighbours,
which a launcher puts on one machine. Expert parallelism takes no ranks of its own: it cuts the same ranks once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from resilin.layout import Mesh
from resilin.parallel.errors import ParallelError

AXES = {"pipeline": "pp", "replicate": "rep", "data": "dp", "context": "cp", "tensor": "tp"}
"""The mesh axis of each degree that takes ranks, from the outermost."""


@dataclass(frozen=True, slots=True)
class Degrees:
    """How many ranks each kind of parallelism has; their product is the number of workers.

    Attributes:
        pipeline: stages that blocks are divided into (times chunks per rank, where a schedule interleaves).
        replicate: copies of the sharded weights (HSDP).
        data: workers among which a step's slots are divided.
        context: ranks among which each sequence is divided.
        tensor: ranks among which each matrix is divided.
        expert: ranks among which experts are divided; divides data * context.
    """

    pipeline: int = 1
    replicate: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ParallelError(f"parallel.{field.name} is {value}; it should be at least 1")
        if (self.data * self.context) % self.expert:
            choices = [n for n in range(1, self.data * self.context + 1) if (self.data * self.context) % n == 0]
            raise ParallelError(
                f"parallel.expert is {self.expert}, but experts are divided among the data * context = {self.data} * "
                f"{self.context} ranks that see different tokens: it should be one of {', '.join(map(str, choices))}"
            )

    @property
    def workers(self) -> int:
        """Ranks in all."""
        return math.prod(getattr(self, name) for name in AXES)

    @property
    def mesh(self) -> Mesh:
        """Of everything but the experts: axes pp, rep, dp, cp, tp."""
        return Mesh(tuple((axis, getattr(self, name)) for name, axis in AXES.items()))

    @property
    def expert_mesh(self) -> Mesh:
        """The same ranks as the experts' tensors see them: axes pp, rep, edp, ep, tp."""
        spread = self.data * self.context
        sizes = self.pipeline, self.replicate, spread // self.expert, self.expert, self.tensor
        return Mesh(tuple(zip(("pp", "rep", "edp", "ep", "tp"), sizes, strict=True)))

    def __str__(self) -> str:
        parts = [f"{name}={getattr(self, name)}" for name in (*AXES, "expert") if getattr(self, name) > 1]
        return " ".join(parts) or "one worker"


def solve(workers: int, auto: str | None, given: Degrees) -> Degrees:
    """Degrees whose product is the number of workers.

    Args:
        workers: how many there are.
        auto: the degree that takes what the others leave, or None; its value in `given` is not looked at.
        given: the degrees asked for.

    Raises:
        ParallelError: naming the product, and the nearest degrees that would do.
    """
    if auto is not None and auto not in AXES:
        raise ParallelError(f"parallel.{auto} cannot be auto; one of {', '.join(AXES)} can")
    fixed = {name: getattr(given, name) for name in AXES if name != auto}
    product = math.prod(fixed.values())
    if auto is not None and workers % product == 0:
        # Experts are checked against the degree found, not against the one that stood in its place.
        return replace(replace(given, expert=1, **{auto: workers // product}), expert=given.expert)
    if auto is None and product == workers:
        return given
    terms = " * ".join(f"{name} {value}" for name, value in fixed.items() if value > 1) or "all degrees 1"
    raise ParallelError(
        f"{workers} workers cannot be divided so: {terms} = {product}"
        + (f", which does not divide {workers}" if auto is not None else f", not {workers}")
        + _nearest(workers, auto, fixed)
    )


def _nearest(workers: int, auto: str | None, fixed: dict[str, int]) -> str:
    """In words, which single changes would do."""
    changes = list(_changes(workers, auto, fixed))
    counts = [n for n in _near_counts(workers, auto, math.prod(fixed.values())) if n > 0]
    said = [f"parallel.{name}={value}" for name, value in changes[:4]]
    said += [f"{count} workers" for count in counts[:2]]
    return f"; use {', or '.join(said)}" if said else ""


def _changes(workers: int, auto: str | None, fixed: dict[str, int]) -> Iterator[tuple[str, int]]:
    product = math.prod(fixed.values())
    found = []
    for name, value in fixed.items():
        others = product // value
        fits = [
            n
            for n in range(1, workers + 1)
            if n != value and (workers % (others * n) == 0 if auto is not None else others * n == workers)
        ]
        if fits and (value > 1 or auto is None):
            best = min(fits, key=lambda n: (abs(n - value), n))
            found.append((abs(best - value), name, best))
    yield from ((name, best) for _, name, best in sorted(found))


def _near_counts(workers: int, auto: str | None, product: int) -> tuple[int, ...]:
    if auto is None:
        return (product,)
    below = workers // product * product
    return (below, below + product)
