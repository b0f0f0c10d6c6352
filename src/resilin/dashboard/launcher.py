"""What the launcher of an elastic run answers, asked at most twice a second and never waited for by a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Ask = Callable[[Path], Mapping[str, Any]]
_PERIOD = 0.5
ADDRESS = "cluster.json"
"""Where a launcher writes how it is reached."""


def ask_launcher(workers: Path) -> Mapping[str, Any]:
    """The launcher's answer to `status`.

    Raises:
        OSError: there is none, or it does not answer.
    """
    if not (workers / ADDRESS).exists():
        raise FileNotFoundError(workers / ADDRESS)
    from resilin.cluster.elastic_job import ask  # brings torch, which a finished run's page does not need

    return ask(workers, {"command": "status"})


@dataclass
class Launcher:
    """Of one run.

    Attributes:
        workers: the folder of its workers.
        ask: gives its answer.
        status: the last answer; None: no elastic run is going on.
        why: it does not answer although it should, in words.
    """

    workers: Path
    ask: Ask = ask_launcher
    status: Mapping[str, Any] | None = None
    why: str = ""
    _asked: float = float("-inf")

    def look(self) -> bool:
        """Ask, if it is time to; tells whether something has changed."""
        if time.monotonic() - self._asked < _PERIOD:
            return False
        before = self.status, self.why
        try:
            self.status, self.why = self.ask(self.workers), ""
        except FileNotFoundError:
            self.status, self.why = None, ""
        except (OSError, ValueError, KeyError) as error:
            self.status, self.why = None, f"the launcher does not answer ({error})"
        self._asked = time.monotonic()
        return (self.status, self.why) != before
