"""The schedule of one step of a real run, as it was measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resilin.parallel.messages import tell_all
from resilin.parallel.pipeline.passes import PipelinePasses
from resilin.parallel.pipeline.schedule import Action
from resilin.parallel.pipeline.timeline import Record, Timeline
from resilin.parallel.world import World


class Trace:
    """Measures the passes of one step, and writes them for `resilin layout schedule --measured`.

    Of several data workers, and of ranks that share a stage's matrices, the first pipeline is written. Workers of
    several machines have several clocks: their times are as good as these agree.

    Args:
        step: which, from 0.
        passes: of this worker.
        world: all workers.
        path: of the file.
    """

    def __init__(self, step: int, passes: PipelinePasses, world: World, path: Path) -> None:
        self._step, self._passes, self._world, self._path = step, passes, world, path

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Entered by all workers while the passes of a step run."""
        if step != self._step:
            yield
            return
        self._passes.measure = True
        try:
            yield
        finally:
            self._passes.measure = False
        group = self._world.group("pp")
        mine = [(str(record.action), record.rank, record.start, record.end) for record in self._passes.records]
        told = [row for rows in tell_all(mine, group) for row in rows]
        if self._world.rank == 0:
            begun = min(start for _, _, start, _ in told)
            records = [Record(Action.parse(a), rank, start - begun, end - begun) for a, rank, start, end in told]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(Timeline.of(records, group.size).text(), encoding="utf-8")
