"""Checkpoints by the number of their step."""

from __future__ import annotations

import re

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.storage import Root

_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """The folder name of a step."""
    return f"step-{step:08d}"


def committed_steps(root: Root) -> list[int]:
    """The steps that were committed, ascending; damaged ones too.

    Raises:
        CheckpointError: the place cannot be listed.
    """
    try:
        names = root.names()
    except OSError as error:
        raise CheckpointError(f"{root.location}: cannot be listed: {error.strerror or error}") from error
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)
