"""Questions of the usual files are read as their harness reads them; what cannot be read is named by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resilin.evaluate.questions import Question, QuestionError, parse_question, read_questions


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "The sky is", "choices": ["blue", "red"], "gold": 1}, Question("The sky is", ("blue", "red"), 1)),
        ({"context": "c", "options": ["x", "y"], "answer": 0}, Question("c", ("x", "y"), 0)),
        ({"ctx": "He", "endings": ["a", "b", "c", "d"], "label": "3"}, Question("He", ("a", "b", "c", "d"), 3)),
        ({"goal": "g", "sol1": "s", "sol2": "t", "label": 1}, Question("g", ("s", "t"), 1)),
        (
            {"question": "Q?", "choices": {"text": ["s", "t"], "label": ["1", "2"]}, "answerKey": "2"},
            Question("Question: Q?\nAnswer:", ("s", "t"), 1),
        ),
        ({"question": "Q?", "choices": ["s", "t"], "answer": "B"}, Question("Question: Q?\nAnswer:", ("s", "t"), 1)),
        (
            {"question": "2+1", "choices": ["4", "3"], "gold": "3"},
            Question("Question: 2+1\nAnswer:", ("4", "3"), 1),
        ),
        (
            {"context": "Facts.", "question": "Q?", "choices": ["s", "t"], "answer": "s"},
            Question("Facts.\nQuestion: Q?\nAnswer:", ("s", "t"), 0),
        ),
        ({"query": "", "choices": ["x", "y"], "gold": 0}, Question("", ("x", "y"), 0)),
        (
            {"question": "Q?", "mc2_targets": {"choices": ["s", "t", "u"], "labels": [0, 1, 1]}},
            Question("Question: Q?\nAnswer:", ("s", "t", "u"), 1, (2,)),
        ),
    ],
    ids=[
        "query",
        "options",
        "hellaswag",
        "piqa",
        "arc",
        "letter",
        "text-before-index",
        "context-question",
        "empty",
        "truthful",
    ],
)
def test_the_usual_field_names_are_understood(row: dict[str, Any], expected: Question) -> None:
    assert parse_question(row) == expected


def test_a_template_builds_the_context_from_the_lines_fields() -> None:
    row = {"question": "Q?", "topic": "birds", "choices": ["s", "t"], "answer": 0}
    assert parse_question(row, "[{topic}] {question} =>").context == "[birds] Q? =>"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"query": "a", "choices": ["x", "y"]}', "no right answer"),
        ('{"query": "a", "gold": 0}', "no choices"),
        ('{"choices": ["x", "y"], "gold": 0}', "no context"),
        ('{"query": "a", "choices": ["x"], "gold": 0}', "at least two"),
        ('{"query": "a", "choices": ["x", ""], "gold": 0}', "non-empty"),
        ('{"query": "a", "choices": "xy", "gold": 0}', "list of non-empty texts"),
        ('{"query": "a", "choices": ["x", "y"], "gold": 2}', "there are 2 choices"),
        ('{"query": "a", "choices": ["x", "y"], "gold": -1}', "there are 2 choices"),
        ('{"query": "a", "choices": ["x", "y"], "gold": "z"}', "expected an index"),
        ('{"query": "a", "choices": ["x", "y"], "gold": true}', "expected an index"),
        ('{"query": 5, "choices": ["x", "y"], "gold": 0}', "should be a text"),
        ('{"question": [], "choices": ["x", "y"], "gold": 0}', "should be a text"),
        ('{"query": "a", "choices": {"text": ["x", "y"]}, "gold": 0}', "lists of equal length"),
        ("[1, 2]", "should be a JSON object"),
        ('{"query": ', "not JSON"),
        (b'{"query": "\xff"}', "byte 12 of the line is not UTF-8"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str | bytes, says: str) -> None:
    path = tmp_path / "q.jsonl"
    good = json.dumps({"query": "a", "choices": ["x", "y"], "gold": 0})
    path.write_bytes(f"{good}\n\n".encode() + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(QuestionError, match=says) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}:3: ")


def test_a_template_that_asks_for_a_field_the_line_lacks_is_named(tmp_path: Path) -> None:
    row = {"query": "a", "choices": ["x", "y"], "gold": 0}
    with pytest.raises(QuestionError, match=r"\{question\}.*such columns: 'query'"):
        parse_question(row, "{question}")


def test_a_file_without_questions_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n\n")
    with pytest.raises(QuestionError, match="holds no questions"):
        read_questions(path)


def test_a_byte_order_mark_and_other_scripts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    row = {"query": "Čeština\u2028je", "choices": ["ano", "ne"], "gold": 0}
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_questions(path) == [Question("Čeština\u2028je", ("ano", "ne"), 0)]
