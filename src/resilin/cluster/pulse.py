"""The death of a process, noticed when it begins to die, and not once it is gone.

A process that is killed first gives up its memory, gigabyte by gigabyte and on cores that others keep busy, and then
ends its connections: whoever looks at those, or at its process, hears of its death up to seconds later. But each of its
threads ends at once, and the kernel hands on the robust mutexes (`pthread_mutexattr_setrobust`) that a thread held. So
a thread of the worker does nothing but hold one, in memory that the launcher has mapped, and a thread of the launcher
waits for it. Linux only; elsewhere, and between machines, connections tell.
"""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Callable, Sequence
from typing import Any

from resilin.checkpoint.dying import killed_by
from resilin.memory.pages import Handle, Pages, PagesError

_BYTES = 4096
_ATTRIBUTES = 64  # more than any system's pthread_mutexattr_t
_SHARED, _ROBUST = 1, 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST of Linux

_held: list[Pages] = []  # by a thread, as long as this process lives


def begin() -> Handle | None:
    """Be watched from now on, by whoever is told what this gives; None: this system cannot."""
    pages = Pages.of(_BYTES)
    if pages.handle is None:
        return None
    locked = threading.Event()
    try:
        _make(pages)
    except (OSError, AttributeError):  # it has no such mutexes
        return None

    def hold() -> None:
        _lock(pages)
        locked.set()
        threading.Event().wait()

    threading.Thread(target=hold, name="resilin-pulse", daemon=True).start()
    locked.wait()
    _held.append(pages)
    return pages.handle


def watch(told: Sequence[int], then: Callable[[int], object]) -> bool:
    """Wait, in a thread, for the death of a process.

    Args:
        told: the numbers of what `begin` gave there.
        then: called with the signal, as soon as one begins to kill it; not if it ends in another way.

    Returns:
        Whether it can be watched from here.
    """
    try:
        handle = Handle.of_json(list(told))
        pages = Pages.mapped(handle)
    except PagesError:
        return False
    threading.Thread(target=_wait, args=(pages, handle.process, then), name="resilin-watching", daemon=True).start()
    return True


def _wait(pages: Pages, process: int, then: Callable[[int], object]) -> None:
    if _lock(pages) == errno.EOWNERDEAD and (signal := killed_by(process)):
        then(signal)


def _make(pages: Pages) -> None:
    """A new mutex at the beginning of pages."""
    attributes, place = ctypes.create_string_buffer(_ATTRIBUTES), ctypes.c_void_p(pages.data.data_ptr())
    for name, *arguments in (
        ("pthread_mutexattr_init", attributes),
        ("pthread_mutexattr_setpshared", attributes, _SHARED),
        ("pthread_mutexattr_setrobust", attributes, _ROBUST),
        ("pthread_mutex_init", place, attributes),
    ):
        if code := _call(name, *arguments):
            raise OSError(code, name)


def _lock(pages: Pages) -> int:
    return _call("pthread_mutex_lock", ctypes.c_void_p(pages.data.data_ptr()))


def _call(name: str, *arguments: Any) -> int:
    function: Any = getattr(ctypes.CDLL(None), name)
    return int(function(*arguments))
