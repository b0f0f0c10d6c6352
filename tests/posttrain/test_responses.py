"""Answers from a pool of models, and the completion and filtering of conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resilin.config import load_settings, parse_settings
from resilin.config.errors import SettingsError
from resilin.data.errors import DataError
from resilin.data.row_files import Row
from resilin.posttrain.completions import CompletionSettings, complete, completion_requests
from resilin.posttrain.filters import AnswerFilters, filter_conversations, identifies_itself
from resilin.posttrain.judge import read_candidates
from resilin.posttrain.responses import ModelPool, draw_models, plan_responses, respond
from resilin.teacher.chat import ChatTeacher, ScriptedTeacher
from resilin.teacher.request import Request, Sample

NAMES = ["own", "a", "b", "c", "d", "e"]


def pool(names: list[str] = NAMES, **settings: Any) -> ModelPool:
    models = {name: {"base_url": "http://localhost:1/v1", "model": f"{name}-1b"} for name in names}
    return parse_settings(ModelPool, {"own": "own", "models": models, **settings}, "pool.toml")


def prompts(count: int) -> list[Row]:
    return [Row({"prompt": f"q{n}", "id": n}, f"line {n}") for n in range(count)]


def scripted(name: str) -> tuple[ChatTeacher, str]:
    return ScriptedTeacher(lambda request, n: f"{request.model} says {n} of {request.n}"), f"{name}-1b"


def test_answers_come_from_the_own_model_and_others_of_the_pool() -> None:
    drawn = [draw_models(f"q{n}", NAMES, "own", 4) for n in range(60)]
    assert all(models[0] == "own" and len(set(models)) == 4 for models in drawn)
    assert {name for models in drawn for name in models} == set(NAMES)

    def teacher_of(name: str) -> tuple[ChatTeacher, str]:
        return (ScriptedTeacher({}), name) if name == "a" else scripted(name)  # fails: the others' answers are there

    found = respond(prompts(20), pool(), teacher_of)
    for number, value in enumerate(found.rows):
        models = {name for name in draw_models(f"q{number}", NAMES, "own", 4) if name != "a"}
        assert {one["model"] for one in value["responses"]} == models
        assert all(one["text"] == f"{one['model']}-1b says 0 of 1" for one in value["responses"])
        assert value["id"] == number
        read_candidates(Row(value, "r"), own_model="own")
    lost = sum("a" in draw_models(f"q{n}", NAMES, "own", 4) for n in range(20))
    assert len(found.failures) == lost > 0
    assert all("a: the script has no answer" in why for _, why in found.failures)


def test_a_small_pool_answers_several_times_the_own_model_first() -> None:
    found = respond(prompts(3), pool(["own"], count=3), scripted)
    assert [one["text"] for one in found.rows[0]["responses"]] == [f"own-1b says {n} of 3" for n in range(3)]
    two = respond(prompts(1), pool(["own", "a"], count=3), scripted)
    assert [one["model"] for one in two.rows[0]["responses"]] == ["own", "own", "a"]


def test_a_prompt_without_the_own_models_answer_makes_no_row() -> None:
    def teacher_of(name: str) -> tuple[ChatTeacher, str]:
        return (ScriptedTeacher({"q1": "mine"}), name) if name == "own" else scripted(name)

    found = respond(prompts(3), pool(["own", "a"], count=2), teacher_of)
    assert [value["prompt"] for value in found.rows] == ["q1"]
    assert found.dropped == {"without an answer of the own model": 2}
    assert [where for where, _ in found.failures] == ["line 0", "line 2"]
    plans = plan_responses(prompts(3), pool(["own", "a"], count=3), scripted)
    assert (plans["own"].calls, plans["a"].calls) == (3, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"own": "me"}, "own = 'me' is none of the models: own, a"),
        ({"temperature": 0.0}, "would give one answer several times"),
        ({"count": 1}, "count = 1"),
        ({"models": {}}, "models"),
    ],
)
def test_pools_that_cannot_be_used_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        pool(["own", "a"], **settings)


def test_the_example_is_a_pool() -> None:
    example = load_settings(ModelPool, Path(__file__).parents[2] / "examples" / "pool.toml")
    assert (example.own, list(example.models)) == ("mine", ["mine", "small", "big"])


# ---------------------------------------------------------------- completions and filters


def test_only_rows_without_an_answer_are_asked_for_and_the_order_stays() -> None:
    rows = [
        Row({"prompt": "a", "id": 1}, "l1"),
        Row({"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "B"}]}, "l2"),
        Row({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "c"}]}, "l3"),
        Row({"prompt": "no answer"}, "l4"),
        Row({"prompt": "long"}, "l5"),
    ]
    script = {"a": " A \n", "c": "C", "long": "L"}

    def says(request: Request, sample: int) -> Sample:
        asked = request.messages[-1]["content"]
        return Sample(script.get(asked, ""), "length" if asked == "long" else "stop")

    how = CompletionSettings(model="big", system="be kind")
    asked = completion_requests(rows, how)
    assert [request.messages[-1]["content"] for request in asked] == ["a", "c", "no answer", "long"]
    assert [request.messages[0]["content"] for request in asked] == ["be kind", "s", "be kind", "be kind"]
    done = complete(rows, ScriptedTeacher(says), how)
    assert [row["messages"][-1]["content"] for row in done.rows] == ["A", "B", "C"]
    assert done.rows[0]["id"] == 1
    assert "prompt" not in done.rows[0]
    assert done.dropped == {"empty": 1, "cut": 1}
    assert done.kept == 1
    lost = complete(rows[:1], ScriptedTeacher({}), how)
    assert lost.failures[0][0] == "l1"
    with pytest.raises(DataError, match="l9: no prompt"):
        complete([Row({}, "l9")], ScriptedTeacher({}), how)


@pytest.mark.parametrize(
    "text",
    [
        "As an AI language model, I have no taste.",
        "I am ChatGPT, how can I help?",
        "I'm Claude.",
        "I was developed by OpenAI to help.",
        "My knowledge cutoff is in 2023.",
        "I’m a large language model.",
    ],
)
def test_answers_that_speak_of_their_maker_are_found(text: str) -> None:
    assert identifies_itself(text)
    assert AnswerFilters().reason(text) == "self-identification"
    assert AnswerFilters(self_identification=True).reason(text) is None


@pytest.mark.parametrize(
    "text", ["I am a llama herder.", "Models of this kind were trained by hand.", "As an assistant, she was kind."]
)
def test_other_texts_are_not(text: str) -> None:
    assert not identifies_itself(text)


def test_conversations_are_filtered_with_a_reason_each() -> None:
    def talk(question: str, *answers: str) -> Row:
        said = [
            m
            for text in answers
            for m in ({"role": "user", "content": question}, {"role": "assistant", "content": text})
        ]
        return Row({"messages": said or [{"role": "user", "content": question}]}, "line")

    rows = [
        talk("q", "fine answer"),
        talk("Q ", "Fine  ANSWER"),
        talk("q", "I'm sorry, but I cannot do that."),
        talk("q", "good", "  "),
        talk("q", "one"),
        talk("q"),
        talk("q", "I am ChatGPT and fine"),
    ]
    kept, left_out = filter_conversations(rows, AnswerFilters(min_words=2))
    assert [row["messages"][1]["content"] for row in kept] == ["fine answer"]
    assert [row["reason"] for row in left_out] == [
        "duplicate", "refused", "too short", "too short", "no answer", "self-identification",
    ]  # fmt: skip
    again, none = filter_conversations([Row(row, "l") for row in kept], AnswerFilters(min_words=2))
    assert (again, none) == (kept, [])
    assert len(filter_conversations(rows[:2], AnswerFilters(), duplicates=True)[0]) == 2
    with pytest.raises(DataError, match="l1: messages should be a list"):
        filter_conversations([Row({"prompt": "x"}, "l1")], AnswerFilters())
