"""Every document of every format is read once, however the files are cut; every flaw is told by file and line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from resilin.data.documents import Blank, Document, as_text, read_piece
from resilin.data.errors import DataError, Problem
from resilin.data.inputs import Inputs, find_inputs, plan_chunks

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), min_size=1, max_size=12)


def read(inputs: Inputs, *, target: int = 1 << 20, key: str = "text", separator: str | None = None) -> list[Any]:
    found = []
    for chunk in plan_chunks(inputs, can_cut=True, target=target):
        for piece in chunk:
            found += list(read_piece(inputs.files[piece.file], piece, key=key, separator=separator))
    return found


def texts(found: list[Any]) -> list[str]:
    joined: list[str] = []
    for item in found:
        if isinstance(item, Document):
            if item.begins:
                joined.append("")
            joined[-1] += item.value
    return joined


@shared
@given(lines=st.lists(LINE, min_size=1, max_size=30), target=st.integers(1, 60), end=st.booleans())
def test_any_cut_of_jsonl_reads_every_line_once(tmp_path: Path, lines: list[str], target: int, end: bool) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines) + "\n" * end)
    assert texts(read(find_inputs([file]), target=target)) == lines


@shared
@given(
    text=st.text(st.sampled_from("ab  \n\n\u00a0日é"), min_size=1, max_size=80),
    target=st.integers(1, 40),
)
@example(text="a\nb\nc\n", target=1)
@example(text="\n\n\n", target=1)
def test_any_cut_of_one_long_text_is_the_whole_text_cut_only_between_lone_lines(
    tmp_path: Path, text: str, target: int
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode())
    found = [item for item in read(find_inputs([file]), target=target) if isinstance(item, Document)]
    assert texts(found) == [text]
    assert [item.begins for item in found] == [True] + [False] * (len(found) - 1)
    assert [item.ends for item in found] == [False] * (len(found) - 1) + [True]
    for left, right in itertools.pairwise(found):
        if left.value and right.value:
            assert left.value[-1] == "\n"
            assert not (left.value[-2:-1] or " ").isspace()
            assert not right.value[0].isspace()


@shared
@given(lines=st.lists(LINE, min_size=1, max_size=20), target=st.integers(1, 60), mark=st.sampled_from(["\n", "##\n"]))
def test_any_cut_between_separated_documents_reads_each_once(
    tmp_path: Path, lines: list[str], target: int, mark: str
) -> None:
    lines = [line.replace("#", "+") for line in lines]
    file = tmp_path / "a.txt"
    file.write_bytes(mark.join(lines).encode())
    found = read(find_inputs([file]), target=target, separator=mark)
    assert texts(found) == [line for line in lines if line.strip()]


def problem_of(path: Path, content: bytes, **kw: Any) -> Problem:
    path.write_bytes(content)
    found = [
        made
        for item in read(find_inputs([path]), **kw)
        if isinstance(made := as_text(item, "text") if isinstance(item, Document) else item, Problem)
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("content", "kind", "place", "words"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "broken JSON", "line 2, byte 14", "Expecting ',' delimiter at column 13"),
        (b'{"text": "a"}\n\n[1, 2]\n', "no object", "line 3, byte 15", "key 'text', not [1, 2]"),
        (b'{"text": "a"}\n{"txt": 1}\n', "missing key", "line 2, byte 14", "no key 'text'; its keys are: txt"),
        (b'{"text": 3}\n', "wrong type", "line 1, byte 0", "'text' should hold text, not 3"),
        (b'{"text": null}\n', "wrong type", "line 1, byte 0", "not null"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "invalid UTF-8", "line 2, byte 24", "0xff: invalid start byte"),
        (b'{"text": "\\ud800"}\n', "invalid UTF-8", "line 1, byte 0", "half a surrogate pair"),
        (b"[" * 100_000 + b"\n", "broken JSON", "line 1, byte 0", "not valid JSON"),
        (b"", "empty file", "bad.jsonl", "is empty"),
    ],
)
def test_a_flawed_line_is_told_by_file_line_and_byte(
    tmp_path: Path, content: bytes, kind: str, place: str, words: str
) -> None:
    problem = problem_of(tmp_path / "bad.jsonl", content)
    assert problem.kind == kind
    assert str(tmp_path / "bad.jsonl") in problem.where
    assert place in problem.where
    assert words in problem.what


def test_invalid_utf8_in_text_costs_only_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    problem = problem_of(file, b"good\nbad \xe9t\xe9\nagain\n")
    assert (problem.kind, problem.where) == ("invalid UTF-8", f"{file}, line 2, byte 9")
    assert texts(read(find_inputs([file]))) == ["good\nagain\n"]


def test_lines_with_nothing_in_them_are_counted_not_errors(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"text": ""}\n  \n{"text": "x"}\n')
    found = read(find_inputs([file]))
    assert sum(isinstance(item, Blank) for item in found) == 2
    assert isinstance(as_text(next(item for item in found if isinstance(item, Document)), "text"), Blank)


def test_folders_are_read_in_the_order_of_names_and_tell_what_they_leave_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "sub/c.md", "notes.pdf", ".hidden.txt", "sub/.git/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_inputs([tmp_path])
    assert [file.name for file in found.files] == ["a.jsonl", "b.txt", "sub/c.md"]
    assert found.left_out == ("notes.pdf",)
    assert [file.name for file in find_inputs([str(tmp_path / "**/*.md")]).files] == ["c.md"]
    assert find_inputs([tmp_path], format="text").left_out == ("a.jsonl", "notes.pdf")


def test_inputs_that_lead_nowhere_or_twice_to_one_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.pdf").write_text("x")
    with pytest.raises(DataError, match="no such file or folder"):
        find_inputs([tmp_path / "nothing.txt"])
    with pytest.raises(DataError, match="no file matches"):
        find_inputs([str(tmp_path / "*.json")])
    with pytest.raises(DataError, match=r"no file in this folder ends in .*1 other files"):
        find_inputs([tmp_path / "other"])
    with pytest.raises(DataError, match="given twice"):
        find_inputs([tmp_path, tmp_path / "a.txt"])


def test_compressed_files_and_json_arrays_are_not_read_as_text(tmp_path: Path) -> None:
    for name, message in (("a.txt.gz", "is compressed; unpack it first"), ("a.json", "set format=jsonl")):
        (tmp_path / name).write_text('{"text": "x"}')
        with pytest.raises(DataError, match=message):
            find_inputs([tmp_path / name])
    assert texts(read(find_inputs([tmp_path / "a.json"], format="jsonl"))) == ["x"]


@pytest.mark.parametrize("target", [1, 100])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, target: int) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"one\ntwo")
    (tmp_path / "b.jsonl").write_bytes(mark + b'{"text": "three"}\r\n{"text": "four"}\r\n')
    assert texts(read(find_inputs([tmp_path]), target=target)) == ["one\ntwo", "three", "four"]
    assert texts(read(find_inputs([tmp_path / "a.txt"]), target=target, separator="\n")) == ["one", "two"]


ROWS = [{"text": f"document {i}", "n": i} for i in range(25)]


@pytest.fixture
def table_files(tmp_path: Path) -> dict[str, Path]:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return {name: tmp_path / name for name in ("a.parquet", "stream.arrow", "file.arrow")}


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("target", [1, 150, 1 << 20])
def test_any_cut_of_a_table_reads_every_row_once(table_files: dict[str, Path], name: str, target: int) -> None:
    found = read(find_inputs([table_files[name]]), target=target)
    assert [item.value for item in found] == [row["text"] for row in ROWS]
    assert found[7].where.endswith(f"{name}, row 7")


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_flawed_tables_are_told(table_files: dict[str, Path], name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'body'; its columns are: text, n"):
        read(find_inputs([table_files[name]]), key="body")
    first = next(item for item in read(find_inputs([table_files[name]]), key="n") if isinstance(item, Document))
    made = as_text(first, "n")
    assert isinstance(made, Problem)
    assert "row 0" in made.where
    broken = tmp_path / f"broken{table_files[name].suffix}"
    broken.write_bytes(table_files[name].read_bytes()[: table_files[name].stat().st_size // 2])
    with pytest.raises(DataError, match="broken"):
        read(find_inputs([broken]))


def test_without_pyarrow_the_message_says_what_to_install(
    table_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'resilin\[datasets\]'"):
        read(find_inputs([table_files["a.parquet"]]))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[], Path]:
    datasets = pytest.importorskip("datasets")

    def make() -> Path:
        data = datasets.Dataset.from_list(ROWS)
        both = datasets.DatasetDict({"train": data, "test": data.select([3, 1])})
        both.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 3, "test": 1})
        return tmp_path / "saved"

    return make


def test_a_data_set_that_datasets_saved_is_read_by_split(saved: Callable[[], Path]) -> None:
    folder = saved()
    assert texts(read(find_inputs([folder]))) == [row["text"] for row in ROWS]
    assert texts(read(find_inputs([folder], split="test"))) == ["document 3", "document 1"]
    assert texts(read(find_inputs([folder / "train"]))) == [row["text"] for row in ROWS]
    with pytest.raises(DataError, match="no split 'dev'; this data set has: train, test"):
        find_inputs([folder], split="dev")
    state = folder / "train" / "state.json"
    tree = json.loads(state.read_text())
    tree["_data_files"][0]["filename"] = "../../outside.arrow"
    state.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="leads out of the folder"):
        find_inputs([folder])
