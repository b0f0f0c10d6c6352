"""Tasks for personas, their answers, and what is checked of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from resilin.config import load_settings, parse_settings
from resilin.config.errors import SettingsError
from resilin.data.errors import DataError
from resilin.data.row_files import Row, write_rows
from resilin.posttrain.constraints import CONSTRAINTS, Constraint
from resilin.posttrain.synthesis import (
    Synthesised,
    Teachers,
    askings,
    plan_synthesis,
    synthesise,
    vote,
)
from resilin.posttrain.synthesis_settings import Synthesis, read_personas
from resilin.posttrain.verifiers import VerifierTable, find_verifier
from resilin.posttrain.verifiers.ifeval_checks import CHECKS
from resilin.teacher.chat import ChatTeacher, ScriptedTeacher
from resilin.teacher.request import Request

PERSONAS = [f"a gardener with {n} trees" for n in range(2, 8)]
GSM = {
    "name": "gsm", "prompt": "A problem for {persona}.", "starts_with": "Problem:", "answer": "{task} Solve it.",
    "verifier": "gsm8k", "votes": 3, "agreement": 0.6,
}  # fmt: skip


def settings(*tasks: dict[str, Any], **more: Any) -> Synthesis:
    return parse_settings(Synthesis, {"tasks": list(tasks), **more}, "tasks.toml")


def gardener(request: Request, sample: int) -> str:
    """Invents a sum from the number of trees, and solves it well, but for the third time."""
    asked = request.messages[-1]["content"]
    trees = int(re.findall(r"\d+", asked)[0])
    if asked.startswith("A problem"):
        return f"Sure!\n**Problem:** {trees} trees and {trees} more are how many trees?"
    return f"{trees} and {trees} make {2 * trees + (sample == 2)} trees."


def made(what: Synthesis, script: Any, personas: list[str] = PERSONAS, **kw: Any) -> Synthesised:
    teacher = script if isinstance(script, ChatTeacher) else ScriptedTeacher(script, **kw)
    return synthesise(what, personas, Teachers(teacher, "big", teacher, "big"))


def test_the_truth_is_what_most_answers_say_and_the_answer_is_one_that_says_it() -> None:
    found = made(settings(GSM), gardener)
    assert len(found.rows) == 6
    for number, row in enumerate(found.rows):
        trees = number + 2
        user, assistant = row["messages"]
        assert user == {"role": "user", "content": f"{trees} trees and {trees} more are how many trees?"}
        assert assistant["content"] == f"{trees} and {trees} make {2 * trees} trees."
        assert (row["ground_truth"], row["dataset"], row["source"]) == (str(2 * trees), "gsm8k", "gsm")
        assert row["agreement"] == pytest.approx(2 / 3)
        assert row["persona"] == PERSONAS[number]
        VerifierTable().check(row)
        assert VerifierTable().score(row, [], assistant["content"]) == 1.0
    strict = made(settings({**GSM, "agreement": 0.7}), gardener)
    assert strict.rows == []
    assert strict.dropped == {"answer: the votes do not agree": 6}


@pytest.mark.parametrize(
    ("name", "texts", "expected"),
    [
        ("gsm8k", ["so 4", "so 5", "so 4"], ("4", [0, 2])),
        ("gsm8k", ["so 4", "so 5"], ("4", [0])),
        ("gsm8k", ["none", "1,000", "1000"], ("1000", [1, 2])),
        ("gsm8k", ["none", "at all"], None),
        ("math", [r"\boxed{\frac{1}{2}}", r"\boxed{3}", r"it is \boxed{0.5}"], (r"\frac{1}{2}", [0, 2])),
        ("math", ["no box", r"\boxed{}"], None),
    ],
)
def test_answers_that_mean_the_same_vote_together(name: str, texts: list[str], expected: Any) -> None:
    assert vote(find_verifier(name), texts) == expected


def test_a_constraint_is_put_into_the_task_and_checked() -> None:
    wanted = [
        {"text": "Use no comma.", "check": {"func_name": "validate_no_commas"}},
        {"text": "Only capitals.", "check": {"func_name": "validate_uppercase"}},
    ]
    task = {"name": "if", "prompt": "Ask for {persona}; then: {constraint}", "constrained": True, "constraints": wanted}

    def script(request: Request, sample: int) -> str:
        asked = request.messages[-1]["content"]
        if asked.startswith("Ask for"):
            return f"Please write about {asked[8:].split(';')[0]}."
        return "TREES, TREES" if asked.endswith("Only capitals.") else "Trees and trees"

    found = made(settings(task), script)
    drawn = [one.constraint for one in askings(settings(task), PERSONAS)]
    assert {one.text for one in drawn if one is not None} == {"Use no comma.", "Only capitals."}
    assert found.dropped == {}
    for row, one in zip(found.rows, drawn, strict=True):
        assert one is not None
        assert row["messages"][0]["content"].endswith(one.text)
        assert (row["dataset"], row["constraint"]) == ("ifeval", one.text)
        assert json.loads(row["ground_truth"]) == one.check
        assert VerifierTable().score(row, [], row["messages"][1]["content"]) == 1.0
    wrong = made(settings(task), lambda request, n: "Some words, and more")
    assert wrong.dropped["task: a duplicate"] == 4
    assert wrong.dropped["answer: does not follow the constraint"] == 2


def test_every_packaged_constraint_can_be_followed_and_broken() -> None:
    good = {
        "validate_no_commas": "a b", "validate_lowercase": "a b", "validate_uppercase": "A B",
        "verify_sentence_constraint": "One. Two.", "verify_bullet_points": "* a\n* b\n* c\n* d",
        "validate_title": "<<T>> x", "validate_json_format": '{"a": 1}', "validate_quotation": '"a"',
        "validate_highlighted_sections": "*a* *b*", "validate_placeholders": "[a] [b] [c]",
        "verify_paragraph_count": "a\n* * *\nb\n* * *\nc", "verify_postscript": "a P.S. b",
        "validate_end": "So. Let me know how it goes.", "validate_sections": "Section 1 a\nSection 2 b",
        "validate_two_responses": "a ****** b",
    }  # fmt: skip
    bad = "Mixed, case. And more. And more. And four."
    for one in CONSTRAINTS:
        name = one.check["func_name"]
        check, arguments = CHECKS[name][0], {key: value for key, value in one.check.items() if key != "func_name"}
        if name == "validate_word_constraint":
            few, many = check("one two", **arguments), check("word " * 200, **arguments)
            assert (few, many) == ((True, False) if arguments["quantifier"] == "at most" else (False, True))
            continue
        assert check(good[name], **arguments), name
        assert not check(bad, **arguments), name
    with pytest.raises(ValueError, match="func_name 'no' is no check"):
        Constraint(text="x", check={"func_name": "no"})


def test_weak_tasks_and_answers_are_left_out_and_counted() -> None:
    plain = {"name": "p", "prompt": "For {persona}", "starts_with": "Task:"}
    tasks = {
        2: "Task: plant two trees in a row", 3: "Task: plant  TWO trees in a row", 4: "Do it yourself now please",
        5: "Task: too short", 6: "Task: I'm sorry, but I cannot invent one", 7: "Task: plant seven trees in a row",
    }  # fmt: skip

    def script(request: Request, sample: int) -> str:
        asked = request.messages[-1]["content"]
        if asked.startswith("For"):
            return tasks[int(re.findall(r"\d+", asked)[0])]
        return "As an AI language model, I plant nothing." if "seven" in asked else "Dig two holes."

    found = made(settings(plain), script)
    assert [row["messages"][0]["content"] for row in found.rows] == ["plant two trees in a row"]
    assert found.dropped == {
        "task: a duplicate": 1, "task: without 'Task:'": 1, "task: too short": 1, "task: refused": 1,
        "answer: self-identification": 1,
    }  # fmt: skip


def test_a_synthesis_that_dies_goes_on_and_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    what = settings({**GSM, "per_persona": 2})
    whole = made(what, gardener)
    calls: list[Request] = []

    def dying(request: Request, sample: int) -> str:
        calls.append(request)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return gardener(request, sample)

    with pytest.raises(KeyboardInterrupt):
        made(what, dying, cache=tmp_path / "c.jsonl")
    again = made(what, dying, cache=tmp_path / "c.jsonl")
    assert again.rows == whole.rows
    # one answer is asked for again: three of its votes were lost with the call that died at its second
    assert len(calls) <= 12 + 12 * 3 + 3
    more = [*PERSONAS, "a gardener with 90 trees"]
    longer = made(what, gardener, more, cache=tmp_path / "c.jsonl")
    assert longer.rows[:6] == whole.rows[:6]


def test_what_it_would_cost_is_known_before_and_exact_when_all_is_cached(tmp_path: Path) -> None:
    what = settings(GSM)
    teacher = ScriptedTeacher(gardener, cache=tmp_path / "c.jsonl")
    teachers = Teachers(teacher, "big", teacher, "big")
    first, second = plan_synthesis(what, PERSONAS, teachers)
    assert (first.calls, second.calls) == (6, 6)
    assert second.completion_tokens == 6 * 3 * 2048
    made(what, teacher, PERSONAS[:2])
    first, second = plan_synthesis(what, PERSONAS, teachers)
    assert (first.calls, first.cached, second.calls, second.cached) == (4, 2, 4, 6)
    assert plan_synthesis(what, PERSONAS[:2], teachers)[1].calls == 0


def test_requests_without_an_answer_are_failures_and_lose_nothing_else() -> None:
    known = {f"A problem for {p}.": f"Problem: {p[16:18]}trees and as many more are how many?" for p in PERSONAS[:3]}
    teacher, solver = ScriptedTeacher(known), ScriptedTeacher(gardener)
    found = synthesise(settings(GSM), PERSONAS, Teachers(teacher, "a", solver, "b"))
    assert len(found.rows) == 3
    assert [where for where, _ in found.failures] == [f"gsm: {persona}" for persona in PERSONAS[3:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "no one"}, r"should hold \{persona\}"),
        ({"prompt": "{persona} {task}"}, "not: .'task'."),
        ({"answer": "solve"}, r"answer needs \{task\}"),
        ({"prompt": "{persona} {constraint}"}, "set constrained = true"),
        ({"constrained": True}, "leave out verifier = 'gsm8k'"),
        ({"verifier": None}, "votes = 3: answers vote"),
        ({"answer_temperature": 0.0}, "would all be one answer"),
        ({"per_persona": 2, "temperature": 0.0}, "would give one task several times"),
        ({"verifier": "code"}, "gsm8k"),
    ],
)
def test_tasks_that_cannot_be_asked_for_are_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings({**GSM, **change})


def test_personas_come_from_rows_or_lines(tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", [{"persona": "a nurse"}, {"persona": " a cook "}])
    (tmp_path / "p.txt").write_text("a smith\n\na nurse\n")
    assert read_personas([str(tmp_path / "p.jsonl"), str(tmp_path / "p.txt")]) == ["a nurse", "a cook", "a smith"]
    write_rows(tmp_path / "bad.jsonl", [{"person": "x"}])
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1: no text in the column persona; columns here: person"):
        read_personas([str(tmp_path / "bad.jsonl")])
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(DataError, match="no personas"):
        read_personas([str(tmp_path / "p.txt")])
    with pytest.raises(DataError, match="cannot be read"):
        read_personas([str(tmp_path / "gone.txt")])


def test_the_example_is_a_synthesis_that_works() -> None:
    what = load_settings(Synthesis, Path(__file__).parents[2] / "examples" / "persona-tasks.toml")
    seen: list[str] = []

    def script(request: Request, sample: int) -> str:
        asked = request.messages[-1]["content"]
        seen.append(asked)
        for word in ("Problem:", "Task:", "Request:"):
            if f'"{word}"' in asked:
                return f"{word} what is two and two and {len(seen)}"
        return "It is \\boxed{4}."

    found = made(what, script, PERSONAS[:1])
    assert [row["source"] for row in found.rows][:3] == ["persona-gsm", "persona-math", "persona-python"]
    assert any(r"into \boxed{}" in text for text in seen)
    for row in found.rows:
        if "ground_truth" in row:
            assert VerifierTable().score(Row(row, "r").value, [], row["messages"][1]["content"]) == 1.0
