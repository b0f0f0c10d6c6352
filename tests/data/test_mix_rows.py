"""Mixing data sets by amounts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.data.chat_source import ChatSource
from resilin.data.errors import DataError
from resilin.data.mix_rows import amount_of, chosen_rows, mix, parse_mix
from resilin.data.row_files import Row, read_rows, write_rows
from resilin.data.settings import SourceContext


@pytest.mark.parametrize(
    ("amount", "rows", "count"),
    [
        ("1", 50, 1),
        ("1.0", 50, 50),
        ("3.0", 50, 150),
        ("0.5", 5, 2),  # cut, not rounded
        ("0.999", 1000, 999),
        ("0.29", 100, 28),  # 0.29 * 100 is a hair below 29 in binary
        ("2.5", 3, 7),
        ("2000", 50, 2000),
        ("0", 50, 0),
        ("0.0", 50, 0),
        (".5", 10, 5),
        ("1.", 7, 7),
    ],
)
def test_a_point_makes_a_fraction_and_none_a_number_of_rows(amount: str, rows: int, count: int) -> None:
    assert amount_of(amount, rows) == count


@pytest.mark.parametrize("amount", ["", "half", "1e3", "-1", "-0.5", "nan.", "1,5", "inf"])
def test_amounts_that_are_none_are_refused(amount: str) -> None:
    with pytest.raises(DataError, match="is no fraction with a point"):
        amount_of(amount, 10)


@given(rows=st.integers(1, 40), wanted=st.integers(0, 130))
def test_rows_are_taken_as_often_as_they_fit_and_the_rest_without_replacement(rows: int, wanted: int) -> None:
    chosen = chosen_rows(rows, wanted, 42)
    assert len(chosen) == wanted
    repeats, rest = divmod(wanted, rows)
    assert chosen[: repeats * rows] == list(range(rows)) * repeats
    tail = chosen[repeats * rows :]
    assert len(set(tail)) == rest
    assert tail == np.random.RandomState(42).choice(rows, size=rest, replace=False).tolist()


def data(name: str) -> list[Row]:
    return [Row({"n": n, "text": name}, f"{name}, line {n + 1}") for n in range({"a": 4, "b": 10, "empty": 0}[name])]


def test_a_mix_is_its_entries_one_after_another_with_their_names() -> None:
    rows = mix([("a", "1.5"), ("b", "3")], read=data)
    assert [row.value["source"] for row in rows] == ["a"] * 6 + ["b"] * 3
    extra = np.random.RandomState(42).choice(4, size=2, replace=False).tolist()
    assert [row.value["n"] for row in rows[:6]] == [0, 1, 2, 3, *extra]
    assert [row.value["n"] for row in rows[6:]] == np.random.RandomState(42).choice(10, size=3, replace=False).tolist()
    assert rows[6].where == f"b, line {rows[6].value['n'] + 1}"
    assert [row.value for row in mix([("a", "1.5"), ("b", "3")], read=data)] == [row.value for row in rows]
    assert [row.value["n"] for row in mix([("b", "3")], 7, read=data)] != [row.value["n"] for row in rows[6:]]
    # Adding an entry changes nothing about the others.
    assert [row.value for row in mix([("b", "3"), ("a", "1.5")], read=data)[:3]] == [row.value for row in rows[6:]]


def test_mixes_that_make_no_sense_are_told() -> None:
    with pytest.raises(DataError, match="names and amounts in turn; this one has 3 items"):
        parse_mix(["a", "1.0", "b"])
    with pytest.raises(DataError, match="names and amounts in turn"):
        parse_mix([])
    with pytest.raises(DataError, match="a: is given twice"):
        mix([("a", "1.0"), ("a", "2")], read=data)
    with pytest.raises(DataError, match="empty: has no rows; the mix asks for 3"):
        mix([("empty", "3")], read=data)
    with pytest.raises(DataError, match="has no rows: raise an amount"):
        mix([("a", "0.1")], read=data)


def talk(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text * 2}]}


def test_a_chat_source_reads_a_mix_of_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [talk(f"a{n}") for n in range(6)])
    write_rows(tmp_path / "b.parquet", [talk(f"b{n}") for n in range(4)])
    settings = {
        "mixer": [str(tmp_path / "a.jsonl"), "0.5", str(tmp_path / "b.parquet"), "2.0"],
        "tokenizer": {"kind": "bytes"},
        "cache": str(tmp_path / "cache"),
        "held_out": {"fraction": 0.0},
        "packing": "pad",
        "sequence_length": 64,
        "epochs": 1,
        "shuffle": False,
    }
    source = ChatSource.model_validate(settings).build(SourceContext(0, "train", 11))
    assert source.slots(0) == 11
    assert len(source) == 1
    (kept,) = (tmp_path / "cache").glob("mix-*.jsonl")
    rows = list(read_rows([kept]))
    assert [row.value["source"] for row in rows] == ["a.jsonl"] * 3 + ["b.parquet"] * 8
    texts = [source.tokenizer.decode(tokens.tolist()) for tokens in source.fetch(0, range(11))["tokens"]]  # type: ignore[union-attr]
    assert all(row.value["messages"][0]["content"] in text for row, text in zip(rows, texts, strict=True))
    for wrong in ({**settings, "paths": ["a.jsonl"]}, {**settings, "mixer": []}):
        with pytest.raises(ValueError, match="either paths or mixer"):
            ChatSource.model_validate(wrong)


def test_rows_are_written_whole_and_read_back(tmp_path: Path) -> None:
    rows = [{"a": 1, "m": [{"role": "user", "content": "日本"}]}, {"a": 2, "m": []}]
    for name in ("x.jsonl", "x.parquet"):
        assert write_rows(tmp_path / "deep" / name, rows) == 2
        assert [row.value for row in read_rows([tmp_path / "deep" / name])] == rows
    with pytest.raises(DataError, match="end in"):
        write_rows(tmp_path / "x.csv", rows)
    with pytest.raises(DataError, match="make no table"):
        write_rows(tmp_path / "y.parquet", [{"a": 1}, {"a": "text"}])
    with pytest.raises(RuntimeError):
        write_rows(tmp_path / "x.jsonl", _breaks())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


def _breaks() -> Any:
    yield {"a": 1}
    raise RuntimeError


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b'{"a": 1}\n[1]\n', "line 2: should be an object"),
        (b'{"a": 1}\n\n{"a"', "line 3: not valid JSON"),
        (b'{"a": "\xff"}', "line 1: invalid UTF-8"),
        (b"[" * 100_000, "line 1: not usable JSON|line 1: not valid JSON"),
    ],
)
def test_broken_files_are_told_by_line(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        list(read_rows([path]))


def test_text_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(DataError, match="is text; rows are read from"):
        list(read_rows([tmp_path / "x.txt"]))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert [row.value for row in read_rows([tmp_path / "b.jsonl"])] == [{"a": 1}]
