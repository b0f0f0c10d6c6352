"""What a worker reads before it needs it: a newcomer while others compute, one that gets blocks beside its own work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, closing
from functools import cache

from resilin.cluster.ahead import read_ahead
from resilin.cluster.peer import Peer, PeerError
from resilin.cluster.pool import CopyError, Pool
from resilin.cluster.protocol.messages import Prepare
from resilin.cluster.restore import Ahead, Restorer
from resilin.cluster.view import View
from resilin.cluster.view_blueprint import ViewBlueprint
from resilin.parallel import activity

WEIGHTS = "weights"
_PATIENCE = 5.0  # seconds within which all have copied the states of a version


class ReadingAhead:
    """Reads from copies of others, and keeps what it has read until it is asked for.

    Args:
        pool: of this member.
        blueprint: of a view.
        connect: to another member.
        awaited: whether there is a place already: then it is too late to begin anew.
    """

    def __init__(
        self,
        pool: Pool,
        blueprint: Callable[[View], ViewBlueprint],
        connect: Callable[[int], Peer],
        awaited: Callable[[], bool],
    ) -> None:
        self._pool, self._blueprint, self._connect, self._awaited = pool, blueprint, connect, awaited
        self._found: Ahead | None = None
        self._thread: threading.Thread | None = None

    def newcomer(self, told: Prepare) -> None:
        """Read all that one needs who has nothing."""
        activity.doing("reading its states from copies, before it has a place")
        self._read(told, None)

    def beside(self, told: Prepare) -> None:
        """Begin to read what of the next view this member does not have, in a thread."""
        number = self._pool.member
        old, new = told.before.stage_of(number), told.view.stage_of(number)
        before, after = self._blueprint(told.before), self._blueprint(told.view)
        had = {*before.names(old)}
        if told.before.stages[old].experts_with(number) != told.view.stages[new].experts_with(number):
            had -= after.experts  # all of a stack is read anew
        lacking = [name for name in after.names(new) if name not in had]
        self._thread = threading.Thread(target=self._read, args=(told, lacking), name="resilin-ahead", daemon=True)
        self._thread.start()

    def wait(self, check: Callable[[], None]) -> None:
        """Until what was begun is there.

        Args:
            check: raises what ends the waiting.
        """
        thread = self._thread
        with activity.waiting((-1,), "waiting for the states of blocks that it is about to get"):
            while thread is not None and thread.is_alive():
                check()
                thread.join(0.005)

    def take(self) -> Ahead | None:
        """What was read; the next one begins with nothing."""
        found, self._found, self._thread = self._found, None, None
        return found

    def _read(self, told: Prepare, lacking: Collection[str] | None) -> None:
        began, number, members = time.monotonic(), self._pool.member, told.before.members
        part = told.view.team_of(number).index(number)
        before, mine = self._blueprint(told.before).all_owners(part), self._blueprint(told.view).owners_with(number)
        where = {member: member for member in members}
        with ExitStack() as stack:
            connect = cache(lambda member: stack.enter_context(closing(self._connect(member))))
            # Not every member has a copy of this version yet.
            while time.monotonic() - began < _PATIENCE and not self._awaited():
                try:
                    restorer = Restorer(self._pool, told.before.epoch, told.version, where, connect)
                    names = None if lacking is None else list(lacking)
                    self._found = read_ahead(before, mine, number, WEIGHTS, restorer, names)
                except CopyError:
                    time.sleep(0.01)
                except (PeerError, OSError, RuntimeError):
                    return  # a member is lost, and this place with it: it is read when there is another
                else:
                    return
