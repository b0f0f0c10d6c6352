"""The quick way through a log gives what a JSON parser gives."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from event_lines import line, start, step
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.dashboard.step_lines import COLUMNS, parts_of
from resilin.run.events import Evaluated, from_json

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
STEPS = st.builds(
    step,
    st.integers(1, 10**7),
    NUMBERS,
    time=st.floats(0, 2e9),
    grad_norm=NUMBERS,
    lr=st.floats(0, 1),
    units=st.integers(0, 10**9),
    seconds=st.floats(0, 1e6),
    mfu=st.one_of(st.none(), st.floats(0, 1)),
    logs=st.dictionaries(st.text(max_size=5), NUMBERS, max_size=3),
)
OTHERS = st.builds(lambda text: Evaluated(step=3, name=text, metrics={"loss": 1.0}), st.text(max_size=10))


def same(left: float, right: float) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))


@settings(max_examples=80)
@given(st.lists(st.one_of(STEPS, OTHERS), max_size=12))
def test_steps_and_other_events_come_in_order_as_the_parser_reads_them(events: list):
    found: list = []
    for part in parts_of(b"".join(map(line, events))):
        if isinstance(part, np.ndarray):
            found += map(tuple, part.T.tolist())
        else:
            found.append(part)
    assert len(found) == len(events)
    for told, event in zip(found, events, strict=True):
        if isinstance(told, tuple):
            assert all(same(value, getattr(event, name)) for name, value in zip(COLUMNS, told, strict=True))
        else:
            assert from_json(told) == event


@pytest.mark.parametrize(
    "strange", [b"what is this", b"[1]", b'{"no":"event"}', b'{"event":"step","step":"many"}', b'{"event":"step"']
)
def test_a_line_that_is_no_event_hides_none_of_its_neighbours(strange: bytes):
    raw = line(start()) + line(step(1)) + strange + b"\n" + line(step(2))
    found = list(parts_of(raw))
    assert [part is None for part in found].count(True) == 1
    assert [list(part[1]) for part in found if isinstance(part, np.ndarray)] == [[1.0], [2.0]]


def test_a_step_that_another_program_has_written_is_a_step_too():
    told = json.loads(line(step(7, 2.5)))
    for other in (json.dumps(dict(reversed(told.items()))), json.dumps(told), json.dumps(told, indent=None) + " "):
        (part,) = parts_of(other.encode() + b"\n")
        assert part.tolist() == [[told[name]] for name in COLUMNS]
