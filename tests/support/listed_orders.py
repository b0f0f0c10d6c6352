"""Operations of a rank of a pipeline that were made before."""

from __future__ import annotations

from collections.abc import Sequence

from resilin.parallel.pipeline.messages import Op


class Listed:
    """The `Orders` of one list, in whatever order it takes micro-batches backward."""

    in_order = False

    def __init__(self, ops: Sequence[Op], stages: int) -> None:
        self._ops, self.stages = ops, stages

    def training(self, step: int, micros: int) -> Sequence[Op]:
        return self._ops

    def evaluating(self, batches: int, total: int) -> Sequence[Op]:
        raise NotImplementedError
