"""Events, the log they are written to, and the history that is read from it."""

from __future__ import annotations

import json
import math
import os
import signal
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.run.events import (
    KINDS,
    Evaluated,
    Event,
    Failure,
    Interrupted,
    RunEnded,
    RunStarted,
    Saved,
    Staged,
    StepDone,
    from_json,
    to_json,
)
from resilin.run.history import HistoryError, read_events
from resilin.run.jsonl_log import JsonlLog


def started(at: int = 0, **changed: Any) -> RunStarted:
    values = {"folder": "x", "settings": {}, "parameters": 3, "device": "cpu", "start_step": at, "total_steps": 9}
    return RunStarted(**{**values, **changed})


def step(number: int, loss: float = 1.0) -> StepDone:
    return StepDone(step=number, loss=loss, lr=0.1, grad_norm=2.0, units=10, seconds=0.5)


numbers = st.floats() | st.just(-0.0)
names = st.text(st.characters(exclude_categories=()), max_size=5)
logs = st.dictionaries(names, numbers, max_size=3)
counts = st.integers(0, 10**12)
values = st.recursive(
    st.none() | st.booleans() | counts | names,
    lambda v: st.lists(v, max_size=2) | st.dictionaries(names, v, max_size=2),
)
events = st.one_of(
    st.builds(
        RunStarted, time=numbers, folder=names, settings=st.dictionaries(names, values, max_size=2), parameters=counts,
        device=names, start_step=counts, total_steps=counts, unit=names, flops_per_unit=st.none() | numbers,
        peak_flops=st.none() | numbers,
    ),
    st.builds(StepDone, time=numbers, step=counts, loss=numbers, lr=numbers, grad_norm=numbers, units=counts,
              seconds=numbers, mfu=st.none() | numbers, logs=logs),
    st.builds(Evaluated, time=numbers, step=counts, name=names, metrics=logs, seconds=numbers),
    st.builds(Staged, time=numbers, step=counts, seconds=numbers),
    st.builds(Saved, time=numbers, step=counts, path=names, bytes=counts, seconds=numbers,
              pruned=st.tuples(counts, counts)),
    st.builds(Failure, time=numbers, step=counts, kind=names, message=names, slots=st.tuples(counts), action=names),
    st.builds(Interrupted, time=numbers, step=counts, signal=names),
    st.builds(RunEnded, time=numbers, step=counts, reason=names, seconds=numbers),
)  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal, where NaN equals NaN."""
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Event):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and bool(a == b)


@given(event=events)
@settings(max_examples=200, deadline=None)
def test_any_event_survives_strict_json(event: Event) -> None:
    text = json.dumps(to_json(event), allow_nan=False)
    assert same(from_json(json.loads(text)), event)


@given(written=st.lists(events, max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_events_survive_the_log(written: list[Event]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"
        with JsonlLog(path) as log:
            for event in written:
                log(event)
        for line in path.read_bytes().split(b"\n")[:-1]:
            json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
        read = read_events(Path(folder), everything=True)
    assert len(read) == len(written)
    assert all(map(same, read, written))


def test_names_of_events_and_fields_stay_what_logs_on_disk_have() -> None:
    shape = {kind.event: [field.name for field in fields(kind)] for kind in KINDS}
    assert shape == {
        "start": ["time", "folder", "settings", "parameters", "device", "start_step", "total_steps", "unit",
                  "flops_per_unit", "peak_flops"],
        "step": ["time", "step", "loss", "lr", "grad_norm", "units", "seconds", "mfu", "logs"],
        "cluster": ["time", "what", "facts"],
        "eval": ["time", "step", "name", "metrics", "seconds"],
        "stage": ["time", "step", "seconds"],
        "save": ["time", "step", "path", "bytes", "seconds", "pruned"],
        "failure": ["time", "step", "kind", "message", "slots", "action"],
        "interrupt": ["time", "step", "signal"],
        "end": ["time", "step", "reason", "seconds"],
    }  # fmt: skip


def test_a_line_reads_like_what_happened() -> None:
    line = json.dumps(
        to_json(StepDone(step=3, loss=math.nan, lr=0.1, grad_norm=math.inf, units=8, seconds=2.0, time=5.0))
    )
    assert line == (
        '{"event": "step", "time": 5.0, "step": 3, "loss": "nan", "lr": 0.1, "grad_norm": "inf", "units": 8, '
        '"seconds": 2.0, "mfu": null, "logs": {}}'
    )


def test_throughput_is_units_by_seconds() -> None:
    assert step(1).units_per_second == 20.0
    assert StepDone(step=1, loss=1, lr=1, grad_norm=1, units=5, seconds=0.0).units_per_second == 0.0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, r"event None is unknown here \(known: start, step, "),
        ({"event": "teleport"}, r"event 'teleport' is unknown.*newer version"),
        ({"event": "step", "step": 1}, r"event 'step' cannot be read: .*missing.*'loss'"),
        ({"event": "end", "step": 1, "reason": "x", "seconds": 1, "mood": 3}, r"unknown field 'mood'"),
        ({"event": "eval", "step": 1, "name": "x", "metrics": 3}, r"event 'eval' cannot be read"),
    ],
)
def test_what_is_not_an_event_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(record)


@dataclass(frozen=True, kw_only=True)
class Resized(Event):
    """A method's own event."""

    event: ClassVar[str] = "resized"
    step: int
    width: float


def test_a_method_may_log_events_of_its_own(tmp_path: Path) -> None:
    with JsonlLog(tmp_path / "events.jsonl") as log:
        log(Resized(step=1, width=math.inf, time=1.0))
    assert read_events(tmp_path, kinds=(*KINDS, Resized)) == [Resized(step=1, width=math.inf, time=1.0)]
    with pytest.raises(HistoryError, match=r"events.jsonl, line 1: event 'resized' is unknown here"):
        read_events(tmp_path)


# -- the log and kills ------------------------------------------------------------------------------------------


def test_every_event_is_in_the_file_at_once(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "new" / "events.jsonl")
    for count in range(1, 4):
        log(step(count))
        assert len(read_events(tmp_path / "new")) == count
    log.close()
    log.close()


def test_a_line_torn_at_any_byte_is_mended_and_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with JsonlLog(path) as log:
        log(step(1))
        whole = path.stat().st_size
        log(step(2, loss=0.25))
    data = path.read_bytes()
    for cut in range(whole, len(data) + 1):
        path.write_bytes(data[:cut])
        finished = cut >= len(data) - 1  # whole but for its line end
        before = read_events(tmp_path)
        assert len(before) == (2 if finished else 1)
        with JsonlLog(path) as log:
            log(step(3))
        after = read_events(tmp_path)
        assert [event.step for event in after] == ([1, 2, 3] if finished else [1, 3])  # type: ignore[attr-defined]


def test_a_torn_line_longer_than_the_window_it_is_sought_in_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for head in ("", json.dumps(to_json(step(1))) + "\n"):
        path.write_text(head + '{"event": "start", "settings": "' + "x" * 300_000)
        with JsonlLog(path) as log:
            log(step(2))
        assert [event.step for event in read_events(tmp_path)] == ([1, 2] if head else [2])  # type: ignore[attr-defined]


def test_zeros_that_a_power_cut_left_at_the_end_are_mended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with JsonlLog(path) as log:
        log(step(1))
    with path.open("ab") as file:
        file.write(bytes(4096))
    assert len(read_events(tmp_path)) == 1
    with JsonlLog(path) as log:
        log(step(2))
    assert len(read_events(tmp_path)) == 2


def test_a_process_killed_while_it_logs_leaves_a_history(tmp_path: Path) -> None:
    ready, wait = os.pipe()
    child = os.fork()
    if child == 0:
        log = JsonlLog(tmp_path / "events.jsonl")
        for number in range(1, 10**9):
            log(step(number))
            if number == 50:
                os.write(wait, b".")
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(wait)
    steps = [event.step for event in read_events(tmp_path)]  # type: ignore[attr-defined]
    assert len(steps) >= 50
    assert steps == list(range(1, len(steps) + 1))


def test_a_full_disk_is_said_once_and_spoils_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = JsonlLog(tmp_path / "events.jsonl")
    log(step(1))
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
        with pytest.warns(UserWarning, match=r"events.jsonl: events are not being recorded \(only 10 of"):
            log(step(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            log(step(3))
    log(step(4))
    log.close()
    assert [event.step for event in read_events(tmp_path)] == [1, 4]  # type: ignore[attr-defined]


# -- history ----------------------------------------------------------------------------------------------------


def write_all(folder: Path, *written: Event) -> None:
    with JsonlLog(folder / "events.jsonl") as log:
        for event in written:
            log(event)


def test_what_a_resume_took_back_is_not_part_of_the_history(tmp_path: Path) -> None:
    write_all(tmp_path, started(), *(step(n, 1.0) for n in range(1, 6)), Saved(step=3, path="", bytes=1, seconds=0))
    write_all(tmp_path, started(3), *(step(n, 2.0) for n in (4,)))
    steps = [(e.step, e.loss) for e in read_events(tmp_path) if isinstance(e, StepDone)]
    assert steps == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]  # and no fifth: it was taken back
    assert len(read_events(tmp_path, everything=True)) == 9
    write_all(tmp_path, started(0), step(1, 3.0))
    assert [type(e) for e in read_events(tmp_path)] == [RunStarted, RunStarted, StepDone]


def test_of_two_records_of_a_step_or_an_evaluation_the_last_counts(tmp_path: Path) -> None:
    def evaluated(name: str, loss: float) -> Evaluated:
        return Evaluated(step=1, name=name, metrics={"loss": loss})

    write_all(tmp_path, step(1, 1.0), evaluated("a", 1.0), evaluated("b", 1.0), step(1, 2.0), evaluated("a", 2.0))
    read = read_events(tmp_path)
    assert [(type(e), getattr(e, "loss", None) or e.metrics["loss"]) for e in read] == [  # type: ignore[attr-defined]
        (Evaluated, 1.0),
        (StepDone, 2.0),
        (Evaluated, 2.0),
    ]


def test_history_is_read_from_the_folder_or_the_file(tmp_path: Path) -> None:
    write_all(tmp_path, step(1))
    assert len(read_events(tmp_path / "events.jsonl")) == 1
    with pytest.raises(HistoryError, match=r"absent/events.jsonl: there is no log; was a run started here\?"):
        read_events(tmp_path / "absent")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json}", "Expecting property name"),
        ("[1, 2]", "a JSON object was expected, not list"),
        ('{"event": "step"', "Expecting ',' delimiter"),
    ],
)
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps(to_json(step(1)))
    (tmp_path / "events.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(HistoryError, match=rf"events.jsonl, line 2: {message}"):
        read_events(tmp_path)


def test_bytes_that_are_not_text_are_named_by_line(tmp_path: Path) -> None:
    good = json.dumps(to_json(step(1))).encode()
    (tmp_path / "events.jsonl").write_bytes(good + b"\n\xff\xfe\n" + good + b"\n")
    with pytest.raises(HistoryError, match=r"events.jsonl, line 2: "):
        read_events(tmp_path)
