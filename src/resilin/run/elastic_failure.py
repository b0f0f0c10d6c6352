"""Whether what failed in an elastic worker is its own failure, or what a change of the view looks like from there."""

from __future__ import annotations

from resilin.cluster.agent import HaltedError
from resilin.cluster.failure import kind_of, of_messages
from resilin.cluster.links import LinksCutError
from resilin.cluster.peer import PeerError
from resilin.cluster.pool import CopyError
from resilin.cluster.snapshots import StoppedError

_CHANGED = (HaltedError, LinksCutError, StoppedError, PeerError, CopyError)


def is_own(error: BaseException) -> bool:
    """Whether an error is this worker's own, and not what a change looks like from here."""
    cause: BaseException | None = error
    while cause is not None:  # a save that was cut says so in its own words
        # Its context is another matter: a change may be what it came in the midst of.
        if isinstance(cause, _CHANGED) or of_messages(cause):
            return False
        cause = cause.__cause__
    return kind_of(error) == "reason"
