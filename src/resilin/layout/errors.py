"""What can be wrong with a layout."""

from __future__ import annotations

from resilin.config import UserError


class LayoutError(UserError):
    """Regions that do not fit their tensor, places that do not fit the layout; the text names tensor and place."""
