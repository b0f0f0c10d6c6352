"""Hints that fade (AHRL)."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.data.errors import DataError
from resilin.data.train_tokenizer import character_tokenizer
from resilin.posttrain.hints import Hints


@given(st.floats(0, 1), st.floats(0, 2), st.floats(0, 1), st.integers(0, 500), st.integers(0, 500))
def test_a_hint_shrinks_with_time_and_sooner_where_the_model_was_right(
    share: float, decay: float, rate: float, step: int, more: int
) -> None:
    hints = Hints(share=share, decay=decay)
    row = {"thought": "a", "pass_rate": rate}
    now = hints.part(row, step)
    assert now == pytest.approx(share * math.exp(-decay * step * rate))
    assert hints.part(row, step + more) <= now <= share
    assert hints.part({"thought": "a", "pass_rate": rate / 2}, step) >= now
    assert hints.part({"thought": "a", "pass_rate": 0}, step) == share  # what it never does keeps its hint
    assert hints.part({"pass_rate": rate}, step) == 0.0


def test_the_first_tokens_of_the_thought_stand_behind_the_prompt() -> None:
    tokenizer = character_tokenizer("abcdefghij")
    hints, row = Hints(share=1.0, decay=0.1), {"thought": "abcdefghij", "pass_rate": 1.0}
    whole = tokenizer.encode("abcdefghij")
    assert hints.tokens(row, 0, tokenizer) == whole
    for step in (1, 5, 20):
        assert hints.tokens(row, step, tokenizer) == whole[: math.floor(10 * math.exp(-0.1 * step))]
    assert hints.tokens(row, 200, tokenizer) == []


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"thought": 3, "pass_rate": 0.5}, "should be a text"),
        ({"thought": "a"}, "pass@k of the first model"),
        ({"thought": "a", "pass_rate": 1.5}, "between 0 and 1"),
        ({"thought": "a", "pass_rate": True}, "between 0 and 1"),
    ],
)
def test_rows_whose_hint_could_not_be_made_are_refused(row: dict[str, object], what: str) -> None:
    with pytest.raises(DataError, match=what):
        Hints().check(row, "prompt row 7")
    Hints().check({"prompt": "b"}, "prompt row 8")
