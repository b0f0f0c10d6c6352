"""Stop strings end a text at the same place however it is split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.inference.stop import StopStrings

letters = st.text("ab", max_size=12)


def by_hand(text: str, stops: list[str]) -> str:
    """Text before the match that is complete first, the longest of those complete at the same character."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(pieces=st.lists(letters, max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_any_split_of_the_text_is_cut_at_the_same_place(pieces: list[str], stops: list[str]) -> None:
    watch = StopStrings(stops)
    shown = "".join(watch.push(piece) for piece in pieces) + watch.flush()
    assert shown == by_hand("".join(pieces), stops)


@given(pieces=st.lists(letters, max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_text_once_shown_is_never_taken_back(pieces: list[str], stops: list[str]) -> None:
    watch, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += watch.push(piece)
        assert not any(stop in shown for stop in stops)


def test_text_that_cannot_begin_a_stop_string_is_shown_at_once() -> None:
    watch = StopStrings(["\n\nUser:"])
    assert watch.push("hello") == "hello"
    assert watch.push("\n") == ""
    assert watch.push("there") == "\nthere"


def test_a_stop_string_over_three_pieces_is_found_and_cut() -> None:
    watch = StopStrings(["<end>"])
    assert [watch.push(piece) for piece in ("a<e", "n", "d>b", "c")] == ["a", "", "", ""]
    assert watch.found == "<end>"
    assert watch.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["x", ""])
