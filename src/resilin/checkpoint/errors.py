"""The error of everything that can go wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; its text names the file, the tensor and what is still good."""
