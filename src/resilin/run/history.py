"""Reading back what happened in a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from resilin.config import UserError
from resilin.run.events import KINDS, Evaluated, Event, RunStarted, StepDone, from_json
from resilin.run.jsonl_log import torn_tail


class HistoryError(UserError):
    """A log that cannot be read; its text names the file and the line."""


def _position(event: Event) -> int:
    step: int = event.start_step if isinstance(event, RunStarted) else getattr(event, "step", 0)
    return step


def _standing(events: list[Event]) -> list[Event]:
    """Without what a resume took back, and with one record for each step and evaluation: the last."""
    kept: list[Event] = []
    for event in events:
        if isinstance(event, RunStarted):
            kept = [old for old in kept if _position(old) <= event.start_step]
        kept.append(event)
    last: dict[object, int] = {}
    for place, event in enumerate(kept):
        if isinstance(event, StepDone):
            last[event.step] = place
        elif isinstance(event, Evaluated):
            last[event.step, event.name] = place
        else:
            last[place, None] = place
    return [kept[place] for place in sorted(last.values())]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise HistoryError(f"{path}: there is no log; was a run started here?") from None
    except OSError as error:
        raise HistoryError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(raw[: len(raw) - torn_tail(raw)].split(b"\n"), start=1):
        if line.strip():
            yield number, line


def read_events(folder: Path, *, everything: bool = False, kinds: tuple[type[Event], ...] = KINDS) -> list[Event]:
    """The events of a run, in order.

    A run that was killed at step 130 and resumed from the checkpoint of step 100 has logged steps 101 to 130 twice,
    or not yet for the second time. Only what led to the present state is returned: what came before the checkpoint,
    then what the resumed run did. A last line cut short by a kill is left out.

    Args:
        folder: the run folder, or the log itself.
        everything: every line, also what a resume took back.
        kinds: the event classes that may appear; add your own to read them.

    Raises:
        HistoryError: naming file and line, for anything that is not an event.
    """
    path = folder if folder.is_file() else folder / "events.jsonl"
    events = []
    for number, line in _lines(path):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"a JSON object was expected, not {type(record).__name__}")
            events.append(from_json(record, kinds))
        except ValueError as error:
            raise HistoryError(f"{path}, line {number}: {error}") from None
    return events if everything else _standing(events)
