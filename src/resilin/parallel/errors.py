"""What goes wrong when work is divided over workers."""

from __future__ import annotations


class ParallelError(ValueError):
    """Degrees that do not multiply to the workers, a model that cannot be cut so, workers that disagree."""
