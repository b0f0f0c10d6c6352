"""What a worker's failure is to the job: a reason, or only what followed from another worker's."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from resilin.parallel.errors import ParallelError

Kind = Literal["reason", "timeout", "lost"]
"""reason: something went wrong in this worker; timeout: it waited in vain for another; lost: another went away."""


REPORT = "RESILIN_FAILURE_REPORT"
"""The variable with the path where a worker that fails says why; it is set by our own launcher only."""


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
    if not of_messages(root):
        return "reason"
    return "timeout" if "imed out" in text or "timeout" in text.lower() else "lost"


def of_messages(error: BaseException) -> bool:
    """Whether it is what torch raises when a message, or a connection to the store, has failed."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "ncclRemote", "c10d"))
    )


def _root(error: BaseException) -> BaseException:
    seen = {id(error)}
    while True:
        before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if before is None or id(before) in seen:
            return error
        error = before
        seen.add(id(error))


def leave_report(error: BaseException, told: str, code: int) -> None:
    """Called in a worker that fails: leaves its reason where the launcher looks for it.

    Args:
        error: that it failed with.
        told: what is to be shown: the traceback, or a message for the user.
        code: that the worker ends with.
    """
    path = os.environ.get(REPORT)
    if path:
        report = {"time": time.time(), "kind": kind_of(error), "told": told, "code": code}
        partial = Path(path).with_suffix(".partial")
        partial.write_text(json.dumps(report), encoding="utf-8")
        partial.rename(path)
