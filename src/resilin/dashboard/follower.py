"""A thread that follows one run while somebody looks at it, and what it tells a page at any moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resilin.dashboard.cluster_map import map_of_settings, map_of_starting, map_of_view, step_cut
from resilin.dashboard.curves import curves
from resilin.dashboard.launcher import Ask, Launcher, ask_launcher
from resilin.dashboard.log_tail import LogTail
from resilin.dashboard.step_lines import parts_of
from resilin.dashboard.story import Story

_PAUSE = 0.2  # seconds between looks at a log that has nothing new
_UNWATCHED = 30.0  # seconds without a question after which the thread ends
_SILENT = 60.0  # seconds without an event after which a run that has no launcher to ask is called silent


class Follower:
    """Of one run.

    Args:
        folder: the run's.
        ask: asks its launcher.
    """

    def __init__(self, folder: Path, ask: Ask = ask_launcher) -> None:
        self.folder = folder
        self._tail = LogTail(folder / "events.jsonl")
        self._launcher = Launcher(folder / "workers", ask)
        self._story = Story()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._asked = 0.0
        self._version = 0
        self._trouble = ""
        self._caught_up = threading.Event()

    # -- following ----------------------------------------------------------------------------------------------

    def wanted(self) -> None:
        """Somebody looks: follow, if nobody does."""
        with self._lock:
            self._asked = time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="resilin-follow", daemon=True)
                self._thread.start()

    def wait(self, seconds: float) -> None:
        """Until all that the log has by now is read, but no longer than this."""
        self._caught_up.wait(seconds)

    def _follow(self) -> None:
        while True:
            more = self.look()
            with self._lock:
                if time.monotonic() - self._asked > _UNWATCHED:
                    self._thread = None
                    return
            if not more:
                time.sleep(_PAUSE)

    def look(self) -> bool:
        """Take in what is new; tells whether there may be more."""
        trouble = ""
        try:
            piece = self._tail.read()
        except OSError as error:
            piece, trouble = None, f"the log cannot be read: {error.strerror}"
        if piece is not None and (piece.raw or piece.anew):
            parts = list(parts_of(piece.raw))  # not while a page waits for the lock
            with self._lock:
                self._version += 1
                if piece.anew:
                    self._story = Story()
                self._story.take(parts)
        more = piece is not None and bool(piece.raw) and self._tail.offset < self._tail.size
        changed = not more and self._launcher.look()  # first all that is known, then what is live
        with self._lock:
            if changed or trouble != self._trouble:
                self._trouble = trouble
                self._version += 1
        if not more:
            self._caught_up.set()
        return more

    # -- answers ------------------------------------------------------------------------------------------------

    def curves(self, by: str, low: float, high: float, points: int) -> dict[str, Any]:
        """See `resilin.dashboard.curves.curves`."""
        with self._lock:
            return curves(self._story.steps, by, low, high, points)

    def state(self, now: float | None = None) -> dict[str, Any]:
        """All but the curves, as JSON values.

        Args:
            now: seconds since 1970; None: as the clock says.
        """
        now = time.time() if now is None else now
        with self._lock:
            story, status = self._story, self._launcher.status
            last = story.steps.last()
            return {
                "folder": str(self.folder),
                "version": self._version,
                "now": now,
                "read": {
                    "bytes": self._tail.offset,
                    "of": self._tail.size,
                    "caught_up": self._caught_up.is_set(),
                    "strange": story.strange,
                },
                "trouble": self._trouble or self._launcher.why,
                "run": {
                    **self._phase(now),
                    **self._numbers(),
                    "step": int(last["step"]) if last is not None else self._begun(),
                    "last": story.last(),
                },
                "map": self._map(status),
                "changes": story.shown_changes(),
                "changes_in_all": len(story.changes.found),
                "marks": story.shown_marks(),
                "evaluations": story.shown_evaluations(),
                "steps": story.steps.count,
                "first_time": story.first_time,
                "last_time": story.last_time,
            }

    def _begun(self) -> int:
        return int(self._story.start["start_step"]) if self._story.start is not None else 0

    def _numbers(self) -> dict[str, Any]:
        story = self._story
        start: Mapping[str, Any] = story.start or {}
        rate, seconds = story.rate()
        total, last = start.get("total_steps"), story.steps.last()
        left = total - int(last["step"]) if total is not None and last is not None else None
        status, view = self._launcher.status, story.changes.view
        return {
            "name": story.settings.get("name") or self.folder.name,
            "total": total,
            "unit": start.get("unit", "units"),
            "rate": rate,
            "step_seconds": seconds,
            "left_seconds": left * seconds if left is not None and seconds is not None else None,
            "parameters": start.get("parameters"),
            "device": start.get("device"),
            "elastic": story.elastic,
            "epoch": status["epoch"] if status is not None else view.get("epoch") if view is not None else None,
            "workers": self._workers(),
            "digest": story.digest,
            "saved": story.saved.get("step") if story.saved is not None else None,
        }

    def _workers(self) -> int | None:
        status, found = self._launcher.status, self._story.changes.found
        if status is not None:
            return sum(one["state"] in ("in", "leaving") for one in status["members"])
        return len(found[-1].facts.get("members", ())) if found else None

    def _phase(self, now: float) -> dict[str, Any]:
        """The run's state in a word, and in words."""
        story, status = self._story, self._launcher.status
        if status is not None:
            words = {
                "gathering": "workers are starting",
                "running": "running",
                "pausing": "a change at the next boundary of steps",
                "halting": "all come out of what they do",
                "adopting": "all take their new places",
                "ended": "ending",
            }
            return {"state": "running", "phase": status["phase"], "words": words.get(status["phase"], status["phase"])}
        if not story.events:
            return {"state": "empty", "phase": "", "words": "nothing has happened yet"}
        if story.ended_job is not None and not story.ended_job.get("good"):
            return {"state": "failed", "phase": "", "words": str(story.ended_job.get("why", "failed"))}
        if story.end is not None:
            return {"state": story.end["reason"], "phase": "", "words": str(story.end["reason"])}
        if story.elastic:  # its launcher does not answer, and it did not say that it ended
            return {
                "state": "failed",
                "phase": "",
                "words": "the launcher is gone: it was killed, or cannot be reached",
            }
        quiet = now - (story.last_time or now)
        _, seconds = story.rate()
        if quiet > max(_SILENT, 20 * (seconds or 0.0)):
            return {"state": "silent", "phase": "", "words": f"no event for {_long(quiet)}: it may have been killed"}
        return {"state": "running", "phase": "", "words": "running"}

    def _map(self, status: Mapping[str, Any] | None) -> dict[str, Any]:
        story = self._story
        if story.changes.view is not None:
            return map_of_view(story.changes.view, status, step_cut(story.settings))
        if status is not None:
            return map_of_starting(status)
        if story.elastic:
            return {"kind": "unknown", "why": "this log was written by an older version, which did not tell the view"}
        if story.start is None:
            return {"kind": "none"}
        return map_of_settings(story.settings)


def _long(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
