"""A pipe by which a process notices that the one that started it is gone, however that one ended."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def when_gone(variable: str, then: Callable[[], object], name: str) -> None:
    """Call something once the other end of a pipe is closed; nothing, where no pipe is named.

    Args:
        variable: of the environment, with the descriptor of this end; it is taken out.
        then: called in a thread of its own.
        name: of that thread.
    """
    if variable not in os.environ:
        return
    pipe = int(os.environ.pop(variable))

    def watch() -> None:
        os.read(pipe, 1)  # nothing is ever written: this returns when the other end is closed
        then()

    threading.Thread(target=watch, name=name, daemon=True).start()
