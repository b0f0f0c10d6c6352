"""Groups of torch's collectives among the members of one view, which any thread can cut at any moment.

Torch's groups cannot be changed, and a member that waits in one for another *survivor* is not woken by the death of a
third. So every epoch has groups of its own, made in about ten milliseconds over a store that the launcher keeps, and
`cut` ends the sockets beneath the old ones: whoever waits in them comes out with an error at once.

Almost at once: a message that is handed to gloo while it notices that a connection has ended is lost sight of, and who
waits for it waits until the timeout. So whoever waits for a collective looks now and then whether the links were cut.
Who gives up to wait for a message between two ranks ends the connections of all: there it is a thread for each group
that waits, and whom it waits for looks at both.
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from resilin.cluster.sockets import internet_sockets, opened
from resilin.cluster.store_connections import StoreConnections
from resilin.parallel.group import Group
from resilin.parallel.neighbours import Neighbours

_making = threading.Lock()
_POLL = 0.5
_LOOK = timedelta(seconds=0.1)


class _Old:
    """What was cut, each kept until nobody else has it, and ended in a thread of its own.

    Whoever drops the last reference to a group waits for all that is under way in it; for a message that was lost sight
    of that is until the timeout. It must not be the thread that trains, at whatever moment garbage is collected. And to
    unmap what neighbours had shown takes milliseconds, in which all would wait for the next view.
    """

    def __init__(self) -> None:
        self._came: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def take(self, them: list[Any]) -> None:
        """Have these end some time; the list is empty afterwards."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._go, name="resilin-old-links", daemon=True)
                self._thread.start()
        while them:
            self._came.put(them.pop())

    def _go(self) -> None:
        kept: list[Any] = []
        while True:
            while not kept or not self._came.empty():
                kept.append(self._came.get())
            time.sleep(_POLL)
            for place in reversed(range(len(kept))):
                if sys.getrefcount(kept[place]) <= 2:  # the list's, and that of the call
                    del kept[place]


_old = _Old()


class LinksCutError(RuntimeError):
    """The groups of this epoch are of no use any more."""


class _Waiter:
    """Waits for messages of one group, one after the other, in a thread that is left behind if need be."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._todo: queue.SimpleQueue[tuple[Any, list[BaseException | None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def wait(self, work: Any) -> None:
        """Return when it is done.

        Raises:
            LinksCutError: the links were cut before.
            RuntimeError: it has failed.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._go, name="resilin-links", daemon=True)
            self._thread.start()
            self._links.on_cut(lambda: self._todo.put(None))
        done: list[BaseException | None] = []
        self._todo.put((work, done))
        if not self._links.until(lambda: bool(done)):
            raise LinksCutError(f"the links of epoch {self._links.epoch} were cut")
        if done[0] is not None:
            raise done[0]

    def _go(self) -> None:
        while (one := self._todo.get()) is not None:
            work, done = one
            try:
                work.wait()
                done.append(None)
            except RuntimeError as error:
                done.append(error)
            self._links.something_is_done()


class Links:
    """The groups of one epoch.

    Args:
        stores: connections to the job's store.
        epoch: of the view.
        rank: this member's place among all of the view.
        timeout: seconds that a collective waits.
        address: of this machine, at which the others reach this member.
    """

    def __init__(
        self, stores: StoreConnections, epoch: int, rank: int, timeout: float, address: str = "127.0.0.1"
    ) -> None:
        self.epoch, self.rank = epoch, rank
        self._timeout, self._address = timedelta(seconds=timeout), address
        self._groups: list[Any] = []
        self._near: list[Neighbours] = []
        self._cut = False
        self._after: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._stores = stores
        self._store, self._sockets = stores.take()  # of its own, which can be cut as well
        self._store.set_timeout(self._timeout)
        self._before: dict[int, int] | None = None

    def group(self, name: str, ranks: Sequence[int], near: bool = True) -> Group:
        """A group; all of its members ask for it.

        Args:
            name: the same at all of them, and no other group's.
            ranks: of its members in the view, in order.
            near: whether they exchange through memory where they can: by one thread each.

        Raises:
            LinksCutError: the links were cut.
            RuntimeError: the others did not all come.
        """
        ranks = tuple(ranks)
        if len(ranks) == 1:
            return Group.alone(self.rank)
        index = ranks.index(self.rank)
        store = PrefixStore(f"links/{self.epoch}/{name}", self._store)
        with _making:
            self._begin()
            try:
                options = self._options()
                backend = self._aside(lambda: dist.ProcessGroupGloo(store, index, len(ranks), options))
                group = dist.ProcessGroup(store, index, len(ranks))
                group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
                group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
                with self._lock:
                    self._refuse_if_cut()
                    self._groups.append(group)
                made = Group(ranks, index, group, self.wait, _Waiter(self).wait, partial(self._within, name))
                if near:
                    made = made.met(self._timeout.total_seconds())
            finally:
                self._end()
        if made.near is not None:
            self._near.append(made.near)
        return made

    def wait(self, work: Any) -> None:
        """Return when a collective is done.

        Raises:
            LinksCutError: the links were cut before.
            RuntimeError: it has failed.
        """
        while not work.is_completed():
            if self._cut:
                raise LinksCutError(f"the links of epoch {self.epoch} were cut")
            with suppress(RuntimeError):  # only that it is not done yet; else it is told below
                work.wait(_LOOK)
        try:
            work.wait()
        except RuntimeError as error:
            if self._cut:
                raise LinksCutError(f"the links of epoch {self.epoch} were cut") from error
            raise

    def _aside(self, make: Callable[[], Any]) -> Any:
        """What a call gives, made in a thread that is left behind once the links are cut.

        Whoever is to be connected to may be gone; where it should have called, there is no socket yet to be ended, and
        gloo waits until the timeout.
        """
        made: list[Any] = []
        failed: list[BaseException] = []

        def go() -> None:
            try:
                made.append(make())
            except BaseException as error:
                failed.append(error)
            self.something_is_done()

        threading.Thread(target=go, name="resilin-making-links", daemon=True).start()
        self.until(lambda: bool(made or failed))
        self._refuse_if_cut()  # then it failed of that
        if failed:
            raise failed[0]
        return made.pop()

    def _within(self, name: str, ranks: tuple[int, ...]) -> Group:
        """A group of some ranks of another."""
        return self.group(f"{name}/{'-'.join(map(str, ranks))}", ranks)

    def _options(self) -> Any:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=self._address)]  # else: wherever this host's name leads
        options._timeout = self._timeout
        return options

    def _begin(self) -> None:
        with self._lock:
            self._refuse_if_cut()
            self._before = self._connected()

    def _end(self) -> None:
        with self._lock:
            if self._before is not None:
                self._sockets |= self._new(self._before)
            self._before = None
            if self._cut:
                self._end_sockets()

    def _refuse_if_cut(self) -> None:
        if self._cut:
            raise LinksCutError(f"the links of epoch {self.epoch} were cut")

    def until(self, done: Callable[[], bool]) -> bool:
        """Wait until something is done, or the links are cut; whether it is done."""
        with self._changed:
            self._changed.wait_for(lambda: done() or self._cut)
        return done()

    def something_is_done(self) -> None:
        """Who waits for it may look."""
        with self._changed:
            self._changed.notify_all()

    def on_cut(self, then: Callable[[], object]) -> None:
        """Call something once the links are cut, or at once if they are."""
        with self._lock:
            if not self._cut:
                self._after.append(then)
                return
        then()

    def cut(self) -> None:
        """End all connections: calls that wait in a group, or for one, fail, in this process and in all others."""
        with self._lock:
            self._cut = True
            if self._before is not None:  # a group is being made, and waits for somebody who may never come
                self._sockets |= self._new(self._before)
            self._end_sockets()
            _old.take(self._groups)
            after, self._after = self._after, []
        for then in after:
            then()
        self.something_is_done()

    def touch(self) -> None:
        """Have the memory ready that these groups will leave to those of the next view."""
        for near in tuple(self._near):
            near.touch()

    def give_up(self) -> None:
        """Leave the memory of these groups to those of the next view, once all of its members have come out of them."""
        for near in self._near:
            near.give_up()
        _old.take(self._near)

    def _end_sockets(self) -> None:
        for number, inode in self._sockets.items():
            with suppress(OSError), opened(number, inode) as same:  # its number may be something else's since
                same.shutdown(socket.SHUT_RDWR)

    def _new(self, before: dict[int, int]) -> dict[int, int]:
        return {number: inode for number, inode in self._connected().items() if before.get(number) != inode}

    def _connected(self) -> dict[int, int]:
        """Connected sockets of this process, but for those to the store: descriptor -> inode."""
        # gloo's listener dies of a shutdown, and its whole process with it.
        return {
            one.number: one.inode for one in internet_sockets() if not one.listens and not self._stores.is_to_store(one)
        }
