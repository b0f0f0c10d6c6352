"""generate, evaluate and export as a user meets them."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

QUESTIONS = [
    {"question": "Which word imports a module?", "choices": ["import", "banana"], "answer": 0},
    {"question": "Which is a number?", "choices": ["seven", "7", "0x"], "answer": "B"},
]


@pytest.fixture
def trained(finished_run: Path) -> str:
    return str(finished_run)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_same_seed_writes_the_same_text_and_samples_differ(resilin: Any, trained: str) -> None:
    command = (
        "generate",
        trained,
        "-p",
        "import ",
        "-p",
        "def ",
        "-n",
        "12",
        "--samples",
        "2",
        "--json",
        "--seed",
        "4",
    )
    first, again = resilin(*command), resilin(*command)
    assert first.returncode == 0, first.stderr
    rows = lines(first.stdout)
    assert first.stdout == again.stdout
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        ("import ", 0),
        ("import ", 1),
        ("def ", 0),
        ("def ", 1),
    ]
    assert rows[0]["tokens"] != rows[1]["tokens"]
    assert all(len(row["tokens"]) == len(row["logprobs"]) <= 12 for row in rows)


def test_text_on_the_terminal_is_the_text_in_json(resilin: Any, trained: str) -> None:
    options = ("-p", "import ", "-n", "10", "--temperature", "0")
    shown = resilin("generate", trained, *options)
    told = lines(resilin("generate", trained, *options, "--json").stdout)[0]
    assert shown.stdout.rstrip("\n") == ("import " + told["text"]).rstrip("\n")
    assert "tokens/s" in shown.stderr


def test_several_answers_are_shown_one_after_the_other(resilin: Any, trained: str) -> None:
    options = ("-p", "import ", "--samples", "3", "-n", "6", "--seed", "2")
    shown = resilin("generate", trained, *options).stdout
    told = lines(resilin("generate", trained, *options, "--json").stdout)
    parts = shown.split("── ")[1:]
    assert len(parts) == 3
    for number, (part, row) in enumerate(zip(parts, told, strict=True), start=1):
        head, _, text = part.partition("\n")
        assert head.startswith(f"{number} of 3")
        assert text.rstrip("\n") == ("import " + row["text"]).rstrip("\n")


def test_a_stop_string_ends_the_text_before_it(resilin: Any, trained: str) -> None:
    free = lines(resilin("generate", trained, "-p", "import ", "-n", "12", "--temperature", "0", "--json").stdout)[0]
    stop = free["text"][3:5]
    cut = resilin("generate", trained, "-p", "import ", "-n", "12", "--temperature", "0", "--json", "--stop", stop)
    row = lines(cut.stdout)[0]
    assert row["text"] == free["text"][: free["text"].index(stop)]
    assert row["ended_by"] == "stop_string"


def test_a_text_is_piped_in(resilin: Any, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("def main"))
    piped = resilin("generate", trained, "-n", "5", "--temperature", "0", "--json")
    assert lines(piped.stdout)[0]["prompt"] == "def main"


def test_a_conversation_is_talked_line_by_line(resilin: Any, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n/new\nb\n"))
    done = resilin("generate", trained, "--chat", "-n", "3", "--temperature", "0.5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")


def test_a_chat_prompt_is_answered_once(resilin: Any, trained: str) -> None:
    row = lines(resilin("generate", trained, "--chat", "--system", "s", "-p", "a", "-n", "3", "--json").stdout)[0]
    assert row["prompt"] == "a"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-p", "x" * 5000), "shorten the prompt"),
        (("-p", "x", "--top-p", "1.5"), "top_p"),
        (("-p", "x", "--system", "y"), "add --chat"),
        (("-p", "x", "--step", "77"), "no checkpoint of step 77"),
        (("--prompt-file", "nothing.txt"), "nothing.txt: cannot be read"),
        (("-p", "x", "--tokenizer", "nowhere"), "nowhere: no such file"),
    ],
)
def test_what_cannot_be_generated_is_told_without_a_traceback(
    resilin: Any, trained: str, options: tuple[str, ...], says: str
) -> None:
    done = resilin("generate", trained, *options)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_runs_own_held_out_data_is_scored(resilin: Any, trained: str) -> None:
    done = resilin("evaluate", trained, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    result = report["results"][0]
    assert report["step"] == 6
    assert result["tokens"] > 100
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert 0 < result["loss"] < 6


def test_texts_and_questions_are_scored_in_one_command(resilin: Any, trained: str, workplace: Path) -> None:
    (workplace / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    options = ("--text", "text/string.py.txt", "--text", "text/heapq.py.txt", "--choices", "q.jsonl")
    results = json.loads(resilin("evaluate", trained, *options, "--json").stdout)["results"]
    assert [row["data"] for row in results] == ["text/string.py.txt", "text/heapq.py.txt", "q.jsonl"]
    assert results[0]["bytes"] == (workplace / "text" / "string.py.txt").stat().st_size
    assert results[0]["tokens"] == results[0]["bytes"]  # a tokenizer of bytes
    assert results[2]["questions"] == 2
    assert results[2]["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    shown = resilin("evaluate", trained, *options).stdout
    assert f"{results[0]['loss']:.4f}" in shown
    assert f"{results[2]['acc']:.4f}" in shown


def test_a_smaller_window_gives_a_worse_or_equal_fit_and_still_scores_every_token(resilin: Any, trained: str) -> None:
    def score(*options: str) -> dict[str, Any]:
        done = resilin("evaluate", trained, "--text", "text/this.py.txt", "--json", *options)
        result: dict[str, Any] = json.loads(done.stdout)["results"][0]
        return result

    wide, narrow = score(), score("--window", "8", "--stride", "8")
    assert wide["tokens"] == narrow["tokens"]
    assert wide["loss"] != narrow["loss"]


def test_token_shards_are_scored_as_the_text_they_came_from(resilin: Any, trained: str, workplace: Path) -> None:
    done = resilin(
        "data", "tokenize", "text/textwrap.py.txt", "--output", "shards", "--tokenizer", f"{trained}/tokenizer"
    )
    assert done.returncode == 0, done.stderr
    window = ("--window", "16", "--stride", "16")
    rows = json.loads(
        resilin("evaluate", trained, "--data", "shards", "--text", "text/textwrap.py.txt", "--json", *window).stdout
    )["results"]
    by_text, by_shards = rows
    assert by_shards["tokens"] == pytest.approx(by_text["tokens"], abs=2)
    assert by_shards["loss"] == pytest.approx(by_text["loss"], abs=0.05)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--text", "nothing.txt"), "nothing.txt: cannot be read"),
        (("--choices", "text/this.py.txt"), "text/this.py.txt:1: not JSON"),
        (("--text", "text/this.py.txt", "--window", "8", "--stride", "9"), "never be scored"),
        (("--text", "text/this.py.txt", "--window", "1000000"), "the model's positions"),
        (("--data", "text"), "no index.json"),
    ],
)
def test_what_cannot_be_evaluated_is_told_without_a_traceback(
    resilin: Any, trained: str, options: tuple[str, ...], says: str
) -> None:
    done = resilin("evaluate", trained, *options)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_an_export_is_itself_a_model_with_nothing_else_to_evaluate_on(
    resilin: Any, trained: str, workplace: Path
) -> None:
    assert resilin("export", trained, "made", "--dtype", "bfloat16").returncode == 0
    again = resilin("export", trained, "made")
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert resilin("export", trained, "made", "--force").returncode == 0
    options = ("-p", "import ", "-n", "8", "--temperature", "0", "--json")
    ours, theirs = (lines(resilin("generate", path, *options).stdout) for path in (trained, "made"))
    assert ours == theirs
    bare = resilin("evaluate", "made")
    assert bare.returncode == 2
    assert "nothing to evaluate on" in bare.stderr
