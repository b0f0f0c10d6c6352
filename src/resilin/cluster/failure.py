"""What a worker's failure is to the job: a reason, or only what followed from another worker's."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist

from resilin.parallel.errors import ParallelError

Kind = Literal["reason", "timeout", "lost"]
"""reason: something went wrong in this worker; timeout: it waited in vain for another; lost: another went away."""


class StrandedError(ParallelError):
    """This worker cannot go on because of another one; its text says what all workers were doing.

    Attributes:
        kind: timeout or lost.
    """

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def kind_of(error: BaseException) -> Kind:
    """What a failure is. What it came from decides, not what it was made into on the way."""
    if isinstance(error, StrandedError):
        return error.kind
    root = _root(error)
    text = str(root)
    talking = isinstance(root, dist.DistError) or (
        isinstance(root, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "ncclRemote", "c10d"))
    )
    if not talking:
        return "reason"
    return "timeout" if "imed out" in text or "timeout" in text.lower() else "lost"


def _root(error: BaseException) -> BaseException:
    seen = {id(error)}
    while True:
        before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if before is None or id(before) in seen:
            return error
        error = before
        seen.add(id(error))
