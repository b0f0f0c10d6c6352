"""`resilin data mix-rows | convert-rows | decontaminate | judge`, as a user types them."""

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


def test_rows_are_converted(tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    run("convert-rows", tmp_path / "p.jsonl", "-o", tmp_path / "o.parquet", "--to", "open-instruct")
    assert values(tmp_path / "o.parquet")[0]["chosen"][1] == {"content": "a", "role": "assistant"}
    write_rows(tmp_path / "r.jsonl", [{**talk("q"), "ground_truth": "4", "dataset": "gsm8k"}])
    run("convert-rows", tmp_path / "r.jsonl", "-o", tmp_path / "v.parquet", "--to", "verl", "--kind", "prompts")
    assert values(tmp_path / "v.parquet")[0]["reward_model"]["ground_truth"] == "4"
    write_rows(tmp_path / "bad.jsonl", [{"prompt": "q", "chosen": "a"}])
    with pytest.raises(UserError, match=r"bad\.jsonl, line 1: the rejected answer is missing"):
        run("convert-rows", tmp_path / "bad.jsonl", "-o", tmp_path / "n.jsonl", "--to", "trl")
    assert not (tmp_path / "n.jsonl").exists()


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
