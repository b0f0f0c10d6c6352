"""Which layers each stage holds: even shares, so many a stage, or the least cost of the slowest stage."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.timeline import Time


@dataclass(frozen=True, slots=True)
class Split:
    """Layers in contiguous parts, one for each stage; the first stage also has the embedding, the last the head.

    Attributes:
        bounds: where each stage begins, and the number of layers at the end: stage `s` has `bounds[s]:bounds[s + 1]`.
    """

    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.bounds) < 2 or self.bounds[0] != 0 or list(self.bounds) != sorted(self.bounds):
            raise ScheduleError(f"bounds of stages rise from 0 to the number of layers, unlike {list(self.bounds)}")

    @property
    def stages(self) -> int:
        """How many stages."""
        return len(self.bounds) - 1

    @property
    def layers(self) -> int:
        """How many layers, without embedding and head."""
        return self.bounds[-1]

    def layers_of(self, stage: int) -> range:
        """The layers of a stage; empty where it has only the embedding or the head."""
        return range(self.bounds[stage], self.bounds[stage + 1])

    def stage_of(self, layer: int) -> int:
        """The stage that holds a layer.

        Raises:
            ScheduleError: there is no such layer.
        """
        if not 0 <= layer < self.layers:
            raise ScheduleError(f"there is no layer {layer} among {self.layers}")
        return bisect_right(self.bounds, layer) - 1

    def counts(self) -> tuple[int, ...]:
        """How many layers each stage has."""
        return tuple(len(self.layers_of(stage)) for stage in range(self.stages))

    def costs(self, layers: Sequence[Time], embedding: Time = 0, head: Time = 0) -> tuple[Time, ...]:
        """The cost of each stage, from that of each layer, the embedding and the head."""
        if len(layers) != self.layers:
            raise ScheduleError(f"{len(layers)} costs are given for {self.layers} layers")
        summed = [sum(layers[layer] for layer in self.layers_of(stage)) for stage in range(self.stages)]
        summed[0] += embedding
        summed[-1] += head
        return tuple(summed)


def even(layers: int, stages: int, embedding: int = 1, head: int = 1) -> Split:
    """Equal shares when the embedding and the head count as layers, as torchtitan splits.

    `layers + embedding + head` are dealt evenly, earlier stages taking what does not divide; then the ends give up
    what the embedding and the head stand for.

    Args:
        layers: of the model.
        stages: at least one.
        embedding: how many layers the embedding counts for.
        head: how many layers the final norm and head count for.

    Raises:
        ScheduleError: more stages than layers, or an end whose share its embedding or head alone would exceed.
    """
    _check_counts(layers, stages, embedding, head)
    if stages == 1:
        return Split((0, layers))
    total = layers + embedding + head
    share, more = divmod(total, stages)
    if share == 0:
        raise ScheduleError(
            f"{stages} stages are more than {layers} layers with embedding ({embedding}) and head ({head}): "
            f"use at most {total} stages"
        )
    for name, weight in (("embedding", embedding), ("head", head)):
        if weight > share:
            raise ScheduleError(
                f"the {name} counts as {weight} layers, but a stage's share is {share} of {total}: use fewer than "
                f"{stages} stages, or let the {name} count for less"
            )
    sizes = [share + (stage < more) for stage in range(stages)]
    sizes[0] -= embedding
    sizes[-1] -= head
    return Split((0, *(sum(sizes[: stage + 1]) for stage in range(stages))))


def by_count(layers: int, per_stage: int, ranks: int, embedding: int = 1, head: int = 1) -> Split:
    """At most so many layers a stage, embedding and head counted: the number of stages follows.

    Args:
        layers: of the model.
        per_stage: the most a stage may count.
        ranks: in the pipeline; each must get equally many stages.
        embedding: as in `even`.
        head: as in `even`.

    Raises:
        ScheduleError: the stages cannot be shared evenly by the ranks, or as in `even`.
    """
    _check_counts(layers, 1, embedding, head)
    if per_stage < 1 or ranks < 1:
        raise ScheduleError(f"a stage needs at least one layer and a pipeline one rank, not {per_stage} and {ranks}")
    total = layers + embedding + head
    stages = -(-total // per_stage)
    if stages % ranks:
        fitting = [k for k in range(1, total + 1) if -(-total // k) % ranks == 0]
        near = min(fitting, key=lambda k: abs(k - per_stage), default=None)
        raise ScheduleError(
            f"{per_stage} layers a stage make {stages} stages of {total} (embedding and head included), which "
            f"{ranks} ranks cannot share evenly"
            + (f": use {near} layers a stage" if near else ": there are too few layers for so many ranks")
        )
    return even(layers, stages, embedding, head)


def balanced(
    layers: Sequence[Time],
    stages: int,
    embedding: Time | None = None,
    head: Time | None = None,
    loads: Sequence[Time] = (),
    allowed: Callable[[int, int, int], bool] | None = None,
    now: Split | None = None,
) -> Split:
    """The split whose slowest stage is the quickest there can be, by an exact dynamic programme.

    Minimises the largest `loads[s] * (cost of stage s)` over contiguous parts. Of the splits that reach it, the one
    in which the fewest layers change their stage from `now`, and of those the one whose early stages, which hold the
    most activations, have the fewest layers. Takes time in proportion to `layers^2 * stages`.

    Args:
        layers: cost of each layer, forward and backward, measured or modelled; not negative. Whole numbers and
            fractions are compared exactly, floats to one part in 10^9.
        stages: how many.
        embedding: its cost; then the first stage may be without layers. None: it costs nothing.
        head: the cost of final norm, head and loss, likewise for the last stage.
        loads: how much each stage is slowed down, such as by having fewer replicas than others; by default 1 each.
        allowed: whether a stage may have layers `first:end`, asked as `allowed(stage, first, end)`; such as whether
            its memory would do. By default it always may.
        now: the split there is, whose layers should stay where they are if that costs nothing.

    Raises:
        ScheduleError: too many stages, a negative cost, lists of the wrong length, or nothing that is allowed.
    """
    count = len(layers)
    _check_counts(count, stages, 0, 0)
    loads = loads or [1] * stages
    if len(loads) != stages:
        raise ScheduleError(f"{len(loads)} loads are given for {stages} stages")
    if any(cost < 0 for cost in (*layers, *loads, embedding or 0, head or 0)):
        raise ScheduleError("costs of layers and loads of stages cannot be negative")
    if now is not None and (now.layers, now.stages) != (count, stages):
        raise ScheduleError(
            f"the present split has {now.layers} layers in {now.stages} stages, not {count} in {stages}"
        )
    most = count + (embedding is not None) + (head is not None)
    if stages > most:
        raise ScheduleError(f"{count} layers cannot fill {stages} stages: use at most {most}")

    sums: list[Time] = [0]
    for cost in layers:
        sums.append(sums[-1] + cost)

    def cost_of(stage: int, first: int, end: int) -> Time | None:
        """Of a stage with these layers; None where it cannot have them."""
        empty_end = (stage == 0 and embedding is not None) or (stage == stages - 1 and head is not None)
        if first == end and not empty_end:
            return None
        if allowed is not None and not allowed(stage, first, end):
            return None
        cost = sums[end] - sums[first]
        if stage == 0:
            cost += embedding or 0
        if stage == stages - 1:
            cost += head or 0
        return loads[stage] * cost

    limit = _least_maximum(count, stages, cost_of)
    if limit is None:
        raise ScheduleError(
            f"no split of {count} layers into {stages} stages is allowed: use more stages or less memory"
        )
    if isinstance(limit, float):
        limit *= 1 + 1e-9
    return _fewest_moved(count, stages, cost_of, limit, now)


_CostOf = Callable[[int, int, int], Time | None]


def _least_maximum(count: int, stages: int, cost_of: _CostOf) -> Time | None:
    best: list[Time | None] = [0, *[None] * count]  # by layers used so far
    for stage in range(stages):
        after: list[Time | None] = [None] * (count + 1)
        for first, before in enumerate(best):
            if before is None:
                continue
            for end in [count] if stage == stages - 1 else range(first, count + 1):
                cost = cost_of(stage, first, end)
                if cost is None:
                    continue
                cost, known = max(before, cost), after[end]
                if known is None or cost < known:
                    after[end] = cost
        best = after
    return best[count]


def _fewest_moved(count: int, stages: int, cost_of: _CostOf, limit: Time, now: Split | None) -> Split:
    """Backwards, so that the smallest bounds can then be read off from the front."""
    moved: list[list[int | None]] = [[None] * (count + 1) for _ in range(stages + 1)]
    moved[stages][count] = 0

    def changed(stage: int, first: int, end: int) -> int:
        if now is None:
            return 0
        kept = min(end, now.bounds[stage + 1]) - max(first, now.bounds[stage])
        return end - first - max(kept, 0)

    following: list[list[int]] = [[0] * (count + 1) for _ in range(stages)]
    for stage in reversed(range(stages)):
        for first in range(count + 1):
            for end in [count] if stage == stages - 1 else range(first, count + 1):
                rest = moved[stage + 1][end]
                if rest is None:
                    continue
                cost = cost_of(stage, first, end)
                if cost is None or cost > limit:
                    continue
                total, known = rest + changed(stage, first, end), moved[stage][first]
                if known is None or total < known:
                    moved[stage][first], following[stage][first] = total, end
    bounds = [0]
    for stage in range(stages):
        bounds.append(following[stage][bounds[-1]])
    return Split(tuple(bounds))


def _check_counts(layers: int, stages: int, embedding: int, head: int) -> None:
    if layers < 1 or stages < 1:
        raise ScheduleError(f"a split needs at least one layer and one stage, not {layers} and {stages}")
    if embedding < 0 or head < 0:
        raise ScheduleError(f"embedding and head cannot count as {embedding} and {head} layers: use 0 or more")
