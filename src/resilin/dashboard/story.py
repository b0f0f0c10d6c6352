"""What happened in a run so far, made of its events one by one: what a page about it needs, and no more. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from resilin.dashboard.changes import Changes
from resilin.dashboard.curves import SHOWN, Steps
from resilin.dashboard.step_lines import Columns, parts_of

_MARKS = 400
_CHANGES = 100
_RECENT = 32  # steps over which a rate is taken
_EVALUATED = 2000  # points of one evaluation's curve


class Story:
    """A run's history.

    Attributes:
        start: the last event `start`; None: there was none yet.
        end: the last event `end`, unless the run went on since.
        ended_job: how the job of an elastic run ended: its facts; None: it goes on, or there is none.
        digest: of the weights at the end; None: it was not told.
        strange: lines that were no events.
        events: how many there were.
    """

    def __init__(self) -> None:
        self.steps = Steps()
        self.changes = Changes()
        self.marks: list[dict[str, Any]] = []
        self.evaluations: dict[str, dict[int, tuple[float, float | None]]] = {}
        self.start: Mapping[str, Any] | None = None
        self.end: Mapping[str, Any] | None = None
        self.ended_job: Mapping[str, Any] | None = None
        self.digest: str | None = None
        self.saved: Mapping[str, Any] | None = None
        self.elastic = False
        self.strange = self.events = 0
        self.first_time: float | None = None
        self.last_time: float | None = None

    def read(self, raw: bytes) -> None:
        """More lines of the log."""
        self.take(parts_of(raw))

    def take(self, parts: Iterable[Columns | dict[str, Any] | None]) -> None:
        """What more lines of the log say."""
        for part in parts:
            if part is None:
                self.strange += 1
            elif isinstance(part, dict):
                try:
                    self._take(part)
                except (KeyError, TypeError, ValueError):
                    self.strange += 1
            else:
                self.steps.add(part)
                self.events += part.shape[1]
                self._seen(float(part[0, 0]), float(part[0, -1]))

    def _seen(self, first: float, last: float) -> None:
        self.first_time = first if self.first_time is None else self.first_time
        self.last_time = last

    def _take(self, told: Mapping[str, Any]) -> None:
        time, kind = float(told["time"]), told["event"]
        self.events += 1
        self._seen(time, time)
        step = int(told["step"]) if "step" in told else None
        if kind == "start":
            self._begin(told, time)
        elif kind == "eval":
            loss = told["metrics"].get("loss")
            value = float(loss) if isinstance(loss, int | float) else None
            self.evaluations.setdefault(str(told["name"]), {})[int(told["step"])] = time, value
        elif kind == "save":
            self.saved = told
            self._mark(time, step, "save", f"saved step {step} in {told['seconds']:.2f} s")
        elif kind == "failure":
            self._mark(time, step, "failure", f"{told['kind']}: {told['message']}")
        elif kind == "interrupt":
            self._mark(time, step, "interrupt", f"asked to end by {told.get('signal', 'SIGINT')}")
        elif kind == "end":
            self.end = told
            self._mark(time, step, "end", f"{told['reason']} at step {step}")
        elif kind == "cluster":
            self._decided(time, str(told["what"]), told["facts"])

    def _begin(self, told: Mapping[str, Any], time: float) -> None:
        start = int(told["start_step"])
        self.start, self.end, self.digest = told, None, None
        if not self.elastic:
            self.ended_job = None
        self.steps.cut(start)
        for curve in self.evaluations.values():
            for step in [step for step in curve if step > start]:
                del curve[step]
        self.marks = [mark for mark in self.marks if mark["step"] is None or mark["step"] <= start]
        if start:
            self._mark(time, start, "resume", f"goes on from step {start}")

    def _decided(self, time: float, what: str, facts: Mapping[str, Any]) -> None:
        if what == "change" and not facts.get("epoch"):
            self.elastic, self.ended_job, self.end, self.digest = True, None, None, None
        if what == "end":
            self.ended_job = facts
        elif what == "homeward":
            self._mark(time, None, "interrupt", str(facts.get("why", "")))
        elif what == "digest":
            self.digest = str(facts["weights"])
        last = self.steps.last()
        change = self.changes.add(time, what, facts, None if last is None else last["time"])
        if change is not None and facts.get("epoch"):
            self._mark(time, facts.get("version"), change.kind, str(facts.get("why", "")))

    def _mark(self, time: float, step: int | None, kind: str, text: str) -> None:
        self.marks.append({"time": time, "step": step, "kind": kind, "text": f"{text:.200}"})

    # -- what is shown ------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of the run; empty: they were not told yet."""
        return self.start["settings"] if self.start is not None else {}

    def last(self) -> dict[str, float | None]:
        """The newest value of every curve; None where there is none, or it is not finite."""
        values = {name: self.steps[name][-1:] for name in SHOWN}
        return {name: float(one[0]) if one.size and np.isfinite(one[0]) else None for name, one in values.items()}

    def rate(self) -> tuple[float | None, float | None]:
        """(units/s, seconds for a step) over the last steps; None: nobody knows."""
        if not self.steps.count:
            return None, None
        seconds, units = self.steps["seconds"][-_RECENT:], self.steps["units"][-_RECENT:]
        total = float(seconds.sum())
        return (float(units.sum()) / total if total > 0 else None), float(np.median(seconds))

    def shown_changes(self) -> list[dict[str, Any]]:
        """The newest changes, newest first, as JSON values."""
        times, seconds = self.steps["time"], self.steps["seconds"]
        found = []
        for change in reversed(self.changes.found[-_CHANGES:]):
            at = int(np.searchsorted(times, change.time, side="right"))
            next_step = float(times[at]) if at < times.size else None
            usual = float(np.median(seconds[max(0, at - 21) : at])) if at else None
            found.append(change.as_json(next_step, usual))
        return found

    def shown_marks(self) -> list[dict[str, Any]]:
        """Marks for the curves: all, or where there are very many, saves first left out, then the oldest."""
        if len(self.marks) <= _MARKS:
            return self.marks
        return [mark for mark in self.marks if mark["kind"] != "save"][-_MARKS:]

    def shown_evaluations(self) -> dict[str, dict[str, list[Any]]]:
        """By name the losses of evaluations."""
        found: dict[str, dict[str, list[Any]]] = {}
        for name, curve in self.evaluations.items():
            steps = sorted(curve)[:: max(1, len(curve) // _EVALUATED)]
            found[name] = {
                "step": steps,
                "time": [curve[step][0] for step in steps],
                "loss": [curve[step][1] for step in steps],
            }
        return found
