"""`resilin data mix-rows | convert-rows | decontaminate | filter-rows | judge`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from resilin.cli.data import app
from resilin.config.errors import UserError
from resilin.data.row_files import read_rows, write_rows


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def talk(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]}


def values(path: Path) -> list[dict[str, Any]]:
    return [row.value for row in read_rows([path])]


def test_rows_are_mixed_and_decontaminated(tmp_path: Path) -> None:
    dirty = "what is the sum of all numbers from one to ten"
    write_rows(tmp_path / "a.jsonl", [talk("clean words here"), talk(f"please {dirty}")])
    write_rows(tmp_path / "b.parquet", [talk(f"b number {n}") for n in range(4)])
    write_rows(tmp_path / "test.jsonl", [{"question": dirty}, {"question": "something else nobody asked for here"}])
    said = run("mix-rows", tmp_path / "a.jsonl", "2.0", tmp_path / "b.parquet", "3", "-o", tmp_path / "mixed.jsonl")
    assert "mixed.jsonl: 7 rows (a.jsonl 4, b.parquet 3)" in said
    out = tmp_path / "clean"
    said = run("decontaminate", tmp_path / "mixed.jsonl", "-o", out, "--test", f"{tmp_path / 'test.jsonl'}:question")
    assert "5 of 7 rows kept, 2 removed" in said
    assert "a.jsonl\t0.5000" in said
    assert len(values(out / "decontaminated.jsonl")) == 5
    again = tmp_path / "again"
    args = ["-o", again, "--test", f"{tmp_path / 'test.jsonl'}:question"]
    assert "0 removed" in run("decontaminate", out / "decontaminated.jsonl", *args)
    assert (again / "decontaminated.jsonl").read_bytes() == (out / "decontaminated.jsonl").read_bytes()
    with pytest.raises(UserError, match="expected a file and its fields"):
        run("decontaminate", tmp_path / "mixed.jsonl", "-o", out, "--test", "question")


ASK, SAY, WORSE = (
    [{"role": role, "content": text}] for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5"))
)
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "preferences": {
        "trl": {"prompt": ASK, "chosen": SAY, "rejected": WORSE},
        "open-instruct": {"prompt": "2+2?", "chosen": [*ASK, *SAY], "rejected": [*ASK, *WORSE]},
        "verl": {"prompt": ASK, "chosen": "4", "rejected": "5"},
    },
    "prompts": {
        "trl": {"prompt": ASK, "ground_truth": "4", "dataset": "gsm8k", "id": "a", "ability": "math"},
        "open-instruct": {"messages": ASK, "ground_truth": "4", "dataset": "gsm8k", "id": "a", "ability": "math"},
        "verl": {
            "data_source": "gsm8k", "prompt": ASK, "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"index": 0, "id": "a"},
        },
    },
    "conversations": {
        "trl": {"prompt": ASK, "completion": SAY},
        "open-instruct": {"messages": [*ASK, *SAY]},
        "verl": {"prompt": "2+2?", "response": "4"},
        "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    },
}  # fmt: skip
WAYS = [(kind, a, b) for kind, forms in FORMS.items() for a in forms for b in forms]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(("kind", "own", "to"), WAYS)
def test_every_form_becomes_every_other_and_further_columns_are_kept(
    kind: str, own: str, to: str, ending: str, tmp_path: Path
) -> None:
    further = {} if kind == "prompts" else {"source": "mine", "id": 7}
    write_rows(tmp_path / f"a.{ending}", [{**FORMS[kind][own], **further}])
    run("convert-rows", tmp_path / f"a.{ending}", "-o", tmp_path / f"b.{ending}", "--to", to, "--kind", kind)
    expected = {**FORMS[kind][to], **further}
    if kind == "prompts" and own == "verl" and to != "verl":
        expected["index"] = 0  # stood in extra_info
    (made,) = values(tmp_path / f"b.{ending}")
    assert made == expected
    run("convert-rows", tmp_path / f"b.{ending}", "-o", tmp_path / f"c.{ending}", "--to", own, "--kind", kind)
    back = values(tmp_path / f"c.{ending}")[0]
    back.pop("index", None) if kind == "prompts" else None
    assert back == {**FORMS[kind][own], **further}


@pytest.mark.parametrize(
    ("kind", "to", "row", "message"),
    [
        ("preferences", "trl", {"prompt": "q", "chosen": "a"}, "the rejected answer is missing"),
        ("preferences", "verl", {"prompt": ASK, "chosen": [*SAY, *ASK, *SAY], "rejected": SAY}, "no plain-text form"),
        ("preferences", "sharegpt", {"prompt": "q"}, "preferences have no form in ShareGPT"),
        (
            "prompts",
            "verl",
            {"prompt": "q", "ground_truth": ["1", "2"], "dataset": ["a", "b"]},
            "names one data_source",
        ),
        ("prompts", "trl", {"q": 1}, "no prompt: expected messages or prompt; columns here: q"),
        ("conversations", "trl", {"text": "q"}, "no conversation: expected messages, .*columns here: text"),
        ("conversations", "trl", {"messages": ASK}, "should end with an answer of the assistant"),
        ("conversations", "verl", {"messages": [*ASK, *SAY, *ASK, *SAY]}, "no form as prompt and response"),
        (
            "conversations",
            "trl",
            {"conversations": [{"from": "bot", "value": "x"}]},
            r"conversations\[0\] should have from",
        ),
        ("conversations", "sharegpt", {"messages": [{"role": "tool", "content": "x"}, *SAY]}, "a message of 'tool'"),
    ],
)
def test_rows_that_have_no_form_are_told_with_file_and_line(
    kind: str, to: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    first = next(iter(FORMS[kind].values()))
    write_rows(tmp_path / "a.jsonl", [first, row])
    with pytest.raises(UserError, match=message) as error:
        run("convert-rows", tmp_path / "a.jsonl", "-o", tmp_path / "b.jsonl", "--to", to, "--kind", kind)
    assert (to == "sharegpt" and kind == "preferences") or "a.jsonl, line 2: " in str(error.value)
    assert not (tmp_path / "b.jsonl").exists()


def test_conversations_are_filtered_and_what_is_left_out_is_kept_apart(tmp_path: Path) -> None:
    rows = [talk("a"), talk("a"), {"messages": [*ASK, {"role": "assistant", "content": "I am ChatGPT."}]}]
    write_rows(tmp_path / "a.jsonl", rows)
    out = run("filter-rows", tmp_path / "a.jsonl", "-o", tmp_path / "b.parquet", "--dropped", tmp_path / "d.jsonl")
    assert "b.parquet: 1 rows; left out: 1 duplicate, 1 self-identification" in out
    assert [row["reason"] for row in values(tmp_path / "d.jsonl")] == ["duplicate", "self-identification"]
    assert values(tmp_path / "b.parquet") == [talk("a")]
    assert "3 rows" in run(
        "filter-rows", tmp_path / "a.jsonl", "-o", tmp_path / "b.jsonl", "--keep-duplicates",
        "--keep-self-identification",
    )  # fmt: skip


def test_what_is_decontaminated_can_be_parquet(tmp_path: Path) -> None:
    dirty = "what is the sum of all numbers from one to ten"
    write_rows(tmp_path / "a.parquet", [talk("clean words here"), talk(f"please {dirty}")])
    write_rows(tmp_path / "test.jsonl", [{"question": dirty}])
    args = ["-o", tmp_path / "clean", "--test", f"{tmp_path / 'test.jsonl'}:question", "--parquet"]
    assert "1 of 2 rows kept" in run("decontaminate", tmp_path / "a.parquet", *args)
    assert [path.name for path in sorted((tmp_path / "clean").iterdir())] == [
        "contamination_results.tsv", "decontaminated.parquet", "matches.jsonl",
    ]  # fmt: skip
    (kept,) = values(tmp_path / "clean" / "decontaminated.parquet")
    assert kept["messages"] == talk("clean words here")["messages"]


JUDGE = '''
from resilin.teacher.chat import ScriptedTeacher
from resilin.teacher.endpoint import TeacherSettings


class Longest(TeacherSettings):
    """Rates by length."""

    def build(self):
        def script(request, sample):
            parts = request.messages[-1]["content"].split("### Text ")[1:]
            return "\\n".join(f"Text {n}: {min(5, len(part.split()))}" for n, part in enumerate(parts, 1))

        return ScriptedTeacher(script)
'''


def test_answers_are_judged_by_a_teacher_from_a_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judge_of_length.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "judge.toml").write_text('use = "my_judge_of_length:Longest"\n')
    write_rows(tmp_path / "r.jsonl", [{"prompt": "q", "responses": ["a", "a b c"]}])
    args = ["judge", tmp_path / "r.jsonl", "-o", tmp_path / "o.jsonl", "--teacher", tmp_path / "judge.toml"]
    assert run(*args, "--dry-run").startswith("4 calls for 4 requests")
    assert not (tmp_path / "o.jsonl").exists()
    assert "1 pairs of 1 prompts" in run(*args)
    assert values(tmp_path / "o.jsonl")[0]["chosen"][0]["content"] == "a b c"
    (tmp_path / "judge.toml").write_text('model = "m"\n')
    with pytest.raises(UserError, match=r"judge\.toml: 1 setting cannot be used\n  teacher\.base_url: missing"):
        run(*args)
    (tmp_path / "judge.json").write_text(json.dumps({"base_url": "http://x/v1", "model": "m", "tries": 9}))
    with pytest.raises(UserError, match=r"teacher\.tries = 9"):
        run(*args[:-1], tmp_path / "judge.json")
    (tmp_path / "judge.toml").write_text("= 5")
    with pytest.raises(UserError, match="should be TOML"):
        run(*args)
    (tmp_path / "judge.toml").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        run(*args)
