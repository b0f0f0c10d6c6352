"""What goes wrong when work is divided over workers."""

from __future__ import annotations

from resilin.config import UserError


class ParallelError(UserError):
    """Degrees that do not multiply to the workers, a model that cannot be cut so, workers that disagree."""
