"""The error of everything that joins experts."""

from __future__ import annotations

from resilin.config import UserError


class JoinError(UserError, ValueError):
    """Models or experts that cannot be joined, or taken apart, as asked; the text says which, why, and what to do."""
