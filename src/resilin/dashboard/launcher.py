"""What the launcher of an elastic run answers, asked at most twice a second and never waited for by a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilin.cluster.place import ask, found

Ask = Callable[[Path], Mapping[str, Any]]
_PERIOD = 0.5


def ask_launcher(workers: Path) -> Mapping[str, Any]:
    """The launcher's answer to `status`.

    Raises:
        OSError: there is none, or it does not answer.
    """
    return ask(found(workers), {"command": "status"})


@dataclass
class Launcher:
    """Of one run.

    Attributes:
        workers: the folder of its workers.
        answer: asks it.
        status: the last answer; None: no elastic run is going on.
        why: it does not answer although it should, in words.
    """

    workers: Path
    answer: Ask = ask_launcher
    status: Mapping[str, Any] | None = None
    why: str = ""
    _asked: float = float("-inf")

    def look(self) -> bool:
        """Ask, if it is time to; tells whether something has changed."""
        if time.monotonic() - self._asked < _PERIOD:
            return False
        before = self.status, self.why
        try:
            self.status, self.why = self.answer(self.workers), ""
        except FileNotFoundError:
            self.status, self.why = None, ""
        except (OSError, ValueError, KeyError) as error:
            self.status, self.why = None, f"the launcher does not answer ({error})"
        self._asked = time.monotonic()
        return (self.status, self.why) != before
