"""Preferences from several answers, and answers judged against a reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from resilin.data.errors import DataError
from resilin.data.preference_rows import read_preference
from resilin.data.row_files import Row
from resilin.posttrain.judge import (
    ASPECTS,
    Candidates,
    RuleRater,
    TeacherRater,
    judge,
    read_candidates,
)
from resilin.posttrain.verifiers import find_verifier
from resilin.posttrain.verifiers.judged import Judged
from resilin.posttrain.verifiers.verifier import VerifierError
from resilin.teacher.chat import CassetteTeacher, ChatTeacher, ScriptedTeacher
from resilin.teacher.endpoint import TeacherSettings
from resilin.teacher.request import Request


def row(prompt: str, *responses: Any, line: int = 1, **more: Any) -> Row:
    return Row({"prompt": prompt, "responses": list(responses), **more}, f"r.jsonl, line {line}")


def candidates(*rows: Row) -> list[Candidates]:
    return [read_candidates(one) for one in rows]


def texts_in(request: Request) -> list[str]:
    asked = request.messages[-1]["content"]
    return re.findall(r"### Text \d+\n(.*?)(?=\n\n)", asked, re.DOTALL)


def by_length(request: Request, sample: int) -> str:
    """A judge who likes long texts: a rating of 1 to 5 for each."""
    return "\n".join(f"Text {n}: {min(5, max(1, len(text)))}" for n, text in enumerate(texts_in(request), 1))


def test_the_best_is_chosen_and_a_worse_one_rejected_whatever_order_the_judge_saw() -> None:
    rows = [row(f"q{n}", "a", "bbb", "ccccc", "dd", line=n) for n in range(40)]
    judged = judge(candidates(*rows), TeacherRater(ScriptedTeacher(by_length), "judge"))
    assert len(judged.rows) == 40
    rejected = set()
    for made in judged.rows:
        pair = read_preference(Row(made, ""))
        assert pair.chosen == [{"role": "assistant", "content": "ccccc"}]
        rejected.add(made["rejected"][0]["content"])
        assert made["chosen_rating"] == 5.0
        assert made["rejected_rating"] == len(made["rejected"][0]["content"])
        assert set(made["chosen_ratings"]) == set(ASPECTS)
    assert rejected == {"a", "bbb", "dd"}  # a random one, not always the worst
    again = judge(candidates(*rows), TeacherRater(ScriptedTeacher(by_length), "judge"))
    assert again.rows == judged.rows
    alone = judge(candidates(rows[7]), TeacherRater(ScriptedTeacher(by_length), "judge"))
    assert alone.rows == [judged.rows[7]]


def test_every_aspect_is_asked_once_for_each_prompt_in_orders_of_its_own() -> None:
    seen: list[Request] = []

    def script(request: Request, sample: int) -> str:
        seen.append(request)
        return by_length(request, sample)

    rater = TeacherRater(ScriptedTeacher(script), "judge")
    asked = candidates(*(row(f"q{n}", "aa", "bbb", "c") for n in range(20)))
    rater.rate(asked)
    assert len(seen) == 20 * len(ASPECTS) == len(rater.requests(asked))
    first = [texts_in(request)[0] for request in seen]
    assert {text: first.count(text) > 12 for text in ("aa", "bbb", "c")} == dict.fromkeys(("aa", "bbb", "c"), True)
    assert {request.temperature for request in seen} == {0.0}


def test_ties_have_no_worse_answer_and_means_are_over_aspects() -> None:
    rules = iter([1.0, 1.0, 5.0, 3.0, 4.0, 4.0])
    judged = judge(candidates(row("p", "a", "b"), row("q", "a", "b", "c", "d")), RuleRater(lambda q, a: next(rules)))
    assert judged.dropped == {"all answers rated alike": 1}
    (made,) = judged.rows
    assert made["chosen"][0]["content"] == "a"
    assert made["chosen_rating"] == 5.0


@pytest.mark.parametrize(
    ("said", "good"),
    [
        ("Text 1: 5\nText 2: 1", True),
        ("**Text 1**: 5\n\n**Text 2**: 1\nThat is all.", True),
        ("Text 1 - Rating: 5\nText 2 - Rating: 1", True),
        ("Text 1: 5", False),
        ("Text 1: 5\nText 3: 1", False),
        ("Text 1: 7\nText 2: 1", False),
        ("Text 1: 4.5\nText 2: 1", False),
        ("I will not.", False),
        ("", False),
    ],
)
def test_a_judgement_that_leaves_a_text_out_is_a_failure_and_not_a_pair(said: str, good: bool) -> None:
    rater = TeacherRater(ScriptedTeacher(lambda request, n: said), aspects={"helpfulness": "Does it help?"})
    judged = judge(candidates(row("q", "a", "b", line=4)), rater)
    assert len(judged.rows) == good
    if not good:
        assert judged.dropped == {"could not be judged": 1}
        assert judged.failures[0][0] == "r.jsonl, line 4"
        assert "helpfulness: the judge rated the texts" in judged.failures[0][1]


def test_a_recorded_judge_needs_no_endpoint(tmp_path: Path) -> None:
    asked = candidates(row("q", "a", "bb"))
    first = judge(asked, TeacherRater(ScriptedTeacher(by_length, cache=tmp_path / "t.jsonl"), "m"))
    again = judge(asked, TeacherRater(CassetteTeacher(tmp_path / "t.jsonl"), "m"))
    assert again.rows == first.rows


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt": "q"}, "responses should be a list of at least two answers"),
        ({"prompt": "q", "responses": ["a"]}, "at least two answers"),
        ({"prompt": "q", "responses": ["a", " "]}, r"responses\[1\] should be a text that is not empty"),
        ({"prompt": "q", "responses": ["a", {"model": "m"}]}, r"responses\[1\]"),
        ({"responses": ["a", "b"]}, "no prompt"),
        ({"prompt": "q", "responses": [{"text": "a", "model": "x"}, "b"]}, "no answer is of 'mine'; models here: x, ?"),
    ],
)
def test_rows_without_answers_to_compare_are_told(value: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"r\.jsonl, line 9: .*{message.replace('?', '[?]')}"):
        read_candidates(Row(value, "r.jsonl, line 9"), own_model="mine")


def test_equal_answers_make_no_pair_however_they_are_rated() -> None:
    rules = iter([5.0, 1.0, 5.0, 1.0, 2.0])
    judged = judge(candidates(row("p", "same", "same "), row("q", "a", "a", "b")), RuleRater(lambda q, a: next(rules)))
    assert judged.dropped == {"all answers rated alike": 1}
    (made,) = judged.rows
    assert made["rejected"][0]["content"] == "b"


class Rule(TeacherSettings):
    """A judge that is a rule: the length of the answer."""

    said: str | None = None

    def build(self) -> ChatTeacher:
        def script(request: Request, sample: int) -> str:
            answer = request.messages[-1]["content"].split("## Answer\n")[1].split("\n\n## Your")[0]
            return self.said if self.said is not None else f"Fine.\nRating: {min(10, len(answer))}"

        return ScriptedTeacher(script)


def test_a_judge_can_be_a_verifier() -> None:
    verifier = Judged(teacher=Rule())
    assert verifier([], "<think>long thoughts</think>four", "reference", "q") == 0.4
    assert verifier([], "x" * 30, "reference", "q") == 1.0
    with pytest.raises(VerifierError, match="the judge gave no verdict: it wrote no rating: 'hm'"):
        Judged(teacher=Rule(said="hm"))([], "a", "r", "q")
    assert Judged(teacher=Rule(said="hm"), on_failure="zero")([], "a", "r", "q") == 0.0
    with pytest.raises(VerifierError, match="no teacher judges"):
        find_verifier("judge")([], "a", "r", "q")
    with pytest.raises(VerifierError, match="a reference or a rubric as text"):
        verifier.check_label(5)
