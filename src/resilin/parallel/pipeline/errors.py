"""What can be wrong with a pipeline schedule."""

from __future__ import annotations

from resilin.config import UserError


class ScheduleError(UserError):
    """A schedule that cannot be built or run, or a split that cannot be made; the text names rank and action."""
