"""A log is read while it is written: every whole line once, whatever the writer and the kill do."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.dashboard.log_tail import LogTail


def all_of(tail: LogTail) -> bytes:
    found = b""
    while raw := tail.read().raw:
        found += raw
    return found


@settings(max_examples=60)
@given(
    lines=st.lists(st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b"") + b"\n"), max_size=20),
    cuts=st.lists(st.integers(0, 400), max_size=8),
    chunk=st.integers(1, 50),
)
def test_every_line_comes_once_however_the_file_grows(lines: list[bytes], cuts: list[int], chunk: int):
    whole = b"".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        path, found = Path(folder) / "log", b""
        tail = LogTail(path, chunk)
        written = 0
        for cut in [*sorted(cuts), len(whole)]:
            with path.open("ab") as file:
                file.write(whole[written:cut])
            written = max(written, min(cut, len(whole)))
            new = all_of(tail)
            assert new.endswith(b"\n") or not new
            found += new
            assert found == whole[: whole[:written].rfind(b"\n") + 1]
            assert tail.offset == len(found)
        assert found == whole


def test_a_line_that_is_cut_short_is_left_until_it_is_whole(tmp_path: Path):
    path = tmp_path / "log"
    tail = LogTail(path)
    path.write_bytes(b"one\ntw")
    assert tail.read().raw == b"one\n"
    assert tail.read().raw == b""
    path.write_bytes(b"one\n")  # as a resume does with what a kill left
    assert tail.read() == tail.read()
    with path.open("ab") as file:
        file.write(b"three\n")
    assert tail.read().raw == b"three\n"


def test_a_file_that_is_not_there_is_waited_for(tmp_path: Path):
    tail = LogTail(tmp_path / "log")
    assert (tail.read().raw, tail.read().anew) == (b"", False)
    (tmp_path / "log").write_bytes(b"here\n")
    assert (tail.read().raw, tail.size) == (b"here\n", 5)


def test_another_file_of_that_name_is_read_from_its_beginning(tmp_path: Path):
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\n")
    tail = LogTail(path)
    assert not tail.read().anew
    other = tmp_path / "other"
    other.write_bytes(b"three\n")
    other.replace(path)
    piece = tail.read()
    assert (piece.raw, piece.anew) == (b"three\n", True)
    path.write_bytes(b"4\n")  # the same file, shorter than what was read
    piece = tail.read()
    assert (piece.raw, piece.anew) == (b"4\n", True)
    path.unlink()
    assert tail.read().anew
    assert not tail.read().anew
