"""The micro-batches of a step, and which worker of the data axis computes which."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resilin.parallel.world import World


def micro_batches(count: int, size: int, workers: int) -> list[range]:
    """The slots of every micro-batch of a step.

    Args:
        count: slots of the step.
        size: slots of a micro-batch; 0: a worker's share of the step.
        workers: of the data axis.
    """
    size = size or -(-count // workers)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def even_batches(count: int, size: int, workers: int, *, alike: bool = False) -> list[range]:
    """The slots of every micro-batch of a step, cut for so many workers: no share is more than one slot larger.

    Dealt in runs, each worker has one share of the slots, in micro-batches as few and as equal as can be (ElasWave,
    section 4: reshaped micro-batches).

    Args:
        count: slots of the step.
        size: the most of a micro-batch; 0: a worker's share.
        workers: of the data axis.
        alike: every worker has as many micro-batches as all others, of which some may be empty: for workers that
            exchange something in each of them.
    """
    each = -(-count // (workers * size)) if size else 1
    shares = in_runs(count, workers)
    return [share[cut.start : cut.stop] for share in shares for cut in in_runs(len(share), each) if alike or len(cut)]


def shared_batches(count: int, size: int, workers: Sequence[int]) -> list[list[range]]:
    """By stage of a pipeline, the slots of every micro-batch of a step where all workers of a stage compute together.

    The step is cut into ticks, the same for all stages, and the workers of a stage share each of them: so every worker
    has as many micro-batches as there are ticks, of which some may be empty. They are listed worker by worker.

    Args:
        count: slots of the step.
        size: the most of a micro-batch.
        workers: of the data axis at each stage.
    """
    ticks = in_runs(count, -(-count // (size * min(workers))))
    shares = [[in_runs(len(tick), each) for tick in ticks] for each in workers]
    return [
        [
            range(tick.start + share[place].start, tick.start + share[place].stop)
            for place in range(each)
            for tick, share in zip(ticks, stage, strict=True)
        ]
        for each, stage in zip(workers, shares, strict=True)
    ]


Dealt = Callable[[int, int], Sequence[Sequence[int]]]
"""How a step's micro-batches, so many of them, are dealt: to each worker, by rank, ascending numbers. Workers that
compute different parts of the model may have the same ones."""


def run_of(micros: int, workers: int, dp: int) -> range:
    """Which of so many micro-batches a worker of the data axis computes."""
    base, more = divmod(micros, workers)
    first = dp * base + min(dp, more)
    return range(first, first + base + (dp < more))


def in_runs(micros: int, workers: int) -> list[range]:
    """Every worker's run of neighbours."""
    return [run_of(micros, workers, dp) for dp in range(workers)]


def along_data(world: World) -> Dealt:
    """Runs of neighbours, by the data axis."""
    places = world.mesh.coordinates()["dp"].tolist()

    def dealt(_: int, micros: int) -> list[range]:
        runs = in_runs(micros, world.axis("dp"))
        return [runs[place] for place in places]

    return dealt
