"""resilin evaluate --suite, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUITE = """
[[evaluations]]
name = "Imports"
skill = "writing"
rows = ["rows.jsonl"]
prompt = "{q}"
truth = "a"
verifier = "contains"
max_new_tokens = 8
chat = false
{more}
[[evaluations]]
name = "Choices"
skill = "choosing"
use = "resilin.posttrain.evaluations.likely:LikelyChoice"
rows = ["choices.jsonl"]
picked = "acc_norm"

[[evaluations]]
name = "Held back"
skill = "choosing"
part = "unseen"
use = "resilin.posttrain.evaluations.likely:LikelyChoice"
rows = ["choices.jsonl"]
"""


def test_a_suite_is_run_compared_and_looked_at_once(resilin: Any, finished_run: Path, workplace: Path) -> None:
    rows = [{"q": "import ", "a": "nothing that it writes"}, {"q": "def ", "a": " "}, {"q": "x", "a": "e"}]
    (workplace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{"question": "A module?", "choices": ["import", "banana"], "answer": n} for n in range(2)]
    (workplace / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (workplace / "suite.toml").write_text(SUITE.replace("{more}", ""))
    run = str(finished_run)

    refused = resilin("evaluate", run, "--suite", "suite.toml")
    assert refused.returncode == 2
    assert "Imports: rows.jsonl, line 2: contains looks for a text that is not empty" in refused.stderr
    assert not (workplace / "suite").exists()

    rows[1]["a"] = "e"
    (workplace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = resilin("evaluate", run, "--suite", "suite.toml", "--report", "first.json")
    assert done.returncode == 0, done.stderr
    assert "skill: choosing" in done.stdout
    report = json.loads((workplace / "first.json").read_text())
    assert report["scores"]["Choices"] == 50.0
    assert report["average"] == (report["scores"]["Imports"] + 50.0) / 2
    assert report["facts"]["Imports"]["rows"] == 3
    assert "Choices" in report["measured"]

    again = resilin("evaluate", run, "--suite", "suite.toml", "--before", "first.json", "--step", "3")
    assert again.returncode == 0, again.stderr
    assert "step 3, dev evaluations" in again.stdout
    assert "+0.0" in again.stdout
    assert "*" not in again.stdout
    (workplace / "suite2.toml").write_text(SUITE.replace("{more}", "limit = 2"))
    other = resilin("evaluate", run, "--suite", "suite2.toml", "--work", "suite", "--before", "first.json")
    assert "* measured on other rows or with other settings than before" in other.stdout

    unseen = ("evaluate", run, "--suite", "suite.toml", "--part", "unseen")
    first = resilin(*unseen)
    assert first.returncode == 0, first.stderr
    assert resilin(*unseen).stdout == first.stdout
    second = resilin(*unseen, "--step", "3")
    assert second.returncode == 2
    assert "the unseen evaluations were looked at on" in second.stderr
    (path,) = (workplace / "suite").glob("*-unseen.json")
    assert json.loads(path.read_text())["part"] == "unseen"


def test_what_is_wrong_with_a_suite_is_told_before_the_model_is_opened(resilin: Any, workplace: Path) -> None:
    (workplace / "bad.toml").write_text('[[evaluations]]\nname = "x"\nskil = "y"\nrows = ["r"]\nverifier = "gsm"\n')
    done = resilin("evaluate", "nowhere", "--suite", "bad.toml")
    assert done.returncode == 2
    assert "did you mean 'skill'" in done.stderr
    assert "no verifier is called 'gsm'" in done.stderr
    (workplace / "good.toml").write_text(SUITE.replace("{more}", ""))
    (workplace / "no.json").write_text("{}")
    done = resilin("evaluate", "nowhere", "--suite", "good.toml", "--before", "no.json")
    assert "no.json: is no report of a suite" in done.stderr
    done = resilin("evaluate", "nowhere", "--suite", "good.toml", "--text", "a.txt", "--limit", "5")
    assert "--text, --limit cannot stand beside it" in done.stderr
    done = resilin("evaluate", "nowhere", "--part", "unseen", "--before", "no.json")
    assert "--part, --before belong to a suite: add --suite FILE" in done.stderr
