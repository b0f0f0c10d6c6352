"""What happens to machines, and when: a trace, as arrays and as a file.

The file is text. Its first line names the format, the machines and the seconds that it covers; the second the columns;
each further line is one event, ascending in time:

    # resilin trace 1, 16 machines, 864000 seconds
    time,event,machine,until,notice,factor
    5012.25,fail,3,8612.25,0,1
    7200,evict,5,10800,120,1
    9000,slow,2,9600,0,1.5

`fail`: a machine is gone, from `time` to `until` (`inf`: for good). `evict`: likewise, announced `notice` seconds
before. `slow`: it takes `factor` times as long as the others meanwhile. Machines are counted from 0.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FAIL, EVICT, SLOW = 0, 1, 2
NAMES = ("fail", "evict", "slow")
COLUMNS = "time,event,machine,until,notice,factor"
_HEAD = re.compile(r"# resilin trace 1, (\d+) machines, (\S+) seconds")


class TraceError(ValueError):
    """A trace that contradicts itself, or a file that is none."""


@dataclass(frozen=True)
class Trace:
    """Events of some machines; arrays are (E,), ascending in time.

    Attributes:
        machines: how many there are.
        seconds: that are covered; nothing is known of what comes later.
        time_E: seconds from the start.
        kind_E: `FAIL`, `EVICT` or `SLOW`.
        machine_E: counted from 0.
        until_E: when it is there again, or as quick as before; inf: never.
        notice_E: seconds by which an eviction is known before.
        factor_E: by which a slow machine's time is multiplied, at least 1.
    """

    machines: int
    seconds: float
    time_E: Floats
    kind_E: Ints
    machine_E: Ints
    until_E: Floats
    notice_E: Floats
    factor_E: Floats

    def __post_init__(self) -> None:
        arrays = (self.time_E, self.kind_E, self.machine_E, self.until_E, self.notice_E, self.factor_E)
        if len({array.shape for array in arrays}) != 1 or self.time_E.ndim != 1:
            raise TraceError(f"arrays of a trace are of one length, not {[array.shape for array in arrays]}")
        if self.machines < 1 or not (0 < self.seconds < math.inf):
            raise TraceError(
                f"a trace covers a machine at least, and a time: {self.machines}, {self.seconds:g} seconds"
            )
        for wrong, said in (
            (~(np.isfinite(self.time_E) & (self.time_E >= 0)), "happens at no time from 0 on"),
            (self.time_E > self.seconds, f"happens after the {self.seconds:g} seconds that are covered"),
            (np.diff(self.time_E, prepend=0.0) < 0, "happens before the one above it"),
            ((self.kind_E < FAIL) | (self.kind_E > SLOW), "is none of fail, evict and slow"),
            (
                (self.machine_E < 0) | (self.machine_E >= self.machines),
                f"is of none of machines 0 to {self.machines - 1}",
            ),
            (~(self.until_E >= self.time_E), "ends before it begins"),
            (~((self.notice_E >= 0) & np.isfinite(self.notice_E)), "is announced at no time before it"),
            ((self.notice_E > 0) & (self.kind_E != EVICT), "is announced, which only an eviction is"),
            (~((self.factor_E >= 1) & np.isfinite(self.factor_E)), "has a factor below 1"),
            ((self.factor_E > 1) & (self.kind_E != SLOW), "has a factor, which only a slow machine has"),
        ):
            if wrong.any():
                raise TraceError(f"event {int(np.argmax(wrong)) + 1} of {len(self)} {said}")

    def __len__(self) -> int:
        return len(self.time_E)

    @classmethod
    def of(cls, machines: int, seconds: float, events: list[tuple[float, str, int, float, float, float]]) -> Trace:
        """From (time, event, machine, until, notice, factor) each, in any order."""
        rows = sorted(events)
        columns = list(zip(*rows, strict=True)) or [()] * 6
        if strange := [name for name in columns[1] if name not in NAMES]:
            raise TraceError(f"an event is one of {', '.join(NAMES)}, not {strange[0]!r}")
        kinds = [NAMES.index(name) for name in columns[1]]
        time_E, until_E, notice_E, factor_E = (np.array(columns[at], dtype=np.float64) for at in (0, 3, 4, 5))
        kind_E, machine_E = (np.array(values, dtype=np.int64) for values in (kinds, columns[2]))
        return cls(machines, seconds, time_E, kind_E, machine_E, until_E, notice_E, factor_E)

    def write(self, path: Path) -> None:
        """Write the file; numbers keep all their digits."""
        lines = [f"# resilin trace 1, {self.machines} machines, {_text(self.seconds)} seconds", COLUMNS]
        lines += [
            f"{_text(time)},{NAMES[kind]},{machine},{_text(until)},{_text(notice)},{_text(factor)}"
            for time, kind, machine, until, notice, factor in zip(
                self.time_E.tolist(),
                self.kind_E.tolist(),
                self.machine_E.tolist(),
                self.until_E.tolist(),
                self.notice_E.tolist(),
                self.factor_E.tolist(),
                strict=True,
            )
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read a file.

        Raises:
            TraceError: naming the line that is not as it should be.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TraceError(f"{path}: cannot be read ({error})") from None
        head = _HEAD.fullmatch(lines[0]) if lines else None
        if head is None:
            raise TraceError(f"{path}:1: a trace begins with '# resilin trace 1, 16 machines, 864000 seconds'")
        if len(lines) < 2 or lines[1] != COLUMNS:
            raise TraceError(f"{path}:2: the columns of a trace are {COLUMNS}")
        events = [_event(f"{path}:{number}", line) for number, line in enumerate(lines[2:], 3)]
        times = [event[0] for event in events]
        for number, (before, time) in enumerate(pairwise(times), 4):
            if time < before:
                raise TraceError(f"{path}:{number}: {time:g} s comes before the line above it: sort events by time")
        try:
            return cls.of(int(head[1]), _number(f"{path}:1", "seconds", head[2]), events)
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from None


def _event(where: str, line: str) -> tuple[float, str, int, float, float, float]:
    cells = line.split(",")
    if len(cells) != 6:
        raise TraceError(f"{where}: an event has the six columns {COLUMNS}; this line has {len(cells)}")
    if cells[1] not in NAMES:
        raise TraceError(f"{where}: an event is one of {', '.join(NAMES)}, not {cells[1]!r}")
    if not cells[2].isdecimal():
        raise TraceError(f"{where}: a machine is a number from 0 on, not {cells[2]!r}")
    time, until, notice, factor = (
        _number(where, name, cells[at]) for at, name in ((0, "time"), (3, "until"), (4, "notice"), (5, "factor"))
    )
    return time, cells[1], int(cells[2]), until, notice, factor


def _number(where: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise TraceError(f"{where}: {name} is a number, not {text!r}")
    return value


def _text(value: float) -> str:
    return repr(value)[:-2] if value.is_integer() and abs(value) < 1e15 else repr(value)
