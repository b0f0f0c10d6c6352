"""What can go wrong with a checkpoint."""

from __future__ import annotations

from resilin.config import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read; its text names the file, the tensor and what is still good."""


class DamagedError(CheckpointError):
    """Files that are missing, or not what was written."""
