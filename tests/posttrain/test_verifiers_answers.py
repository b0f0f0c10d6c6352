"""Verifiers that compare an answer with one of several texts, with spans, or with what it should refuse."""

from __future__ import annotations

from typing import Any

import pytest

from resilin.posttrain.verifiers import find_verifier
from resilin.posttrain.verifiers.refusal import Refusal
from resilin.posttrain.verifiers.verifier import VerifierError
from resilin.teacher.chat import ChatTeacher, ScriptedTeacher
from resilin.teacher.endpoint import TeacherSettings
from resilin.teacher.request import Request


@pytest.mark.parametrize(
    ("name", "text", "label", "score"),
    [
        ("exact", " (B). ", "B", 1),
        ("exact", "The a", "a", 0),
        ("exact", "A", "a", 1),
        ("exact", "the  Red Sea", "The red sea", 1),
        ("exact", "red", ["blue", "red"], 1),
        ("exact", "5", 5, 1),
        ("exact", "<think>4</think>5", "5", 1),
        ("exact", "[x]", "[x]", 1),
        ("contains", "It was Ada Lovelace, I think", '["Ada King", "ada lovelace"]', 1),
        ("contains", "It was Ada", ["Ada Lovelace"], 0),
        ("contains", "<think>Ada</think>Babbage", "Ada", 0),
        # the cases of the published metric: articles and punctuation go, numbers must be there
        ("drop_f1", "the Denver Broncos", "Denver Broncos.", 1),
        ("drop_f1", "Broncos", "Denver Broncos", 2 / 3),
        ("drop_f1", "5", "5.0", 1),
        ("drop_f1", "5 yards", "5", 2 / 3),
        ("drop_f1", "6 yards", "5 yards", 0),
        ("drop_f1", "25-yard", "25 yard", 1),
        ("drop_f1", "Smith", [["Smith", "Jones"]], 1 / 2),
        ("drop_f1", "Jones", ["Smith", ["Jones"]], 1),
        ("drop_f1", "", "x", 0),
        ("refusal", "I'm sorry, but I can't help with that.", "refuse", 1),
        ("refusal", "I’m sorry, but I can’t help with that.", "refuse", 1),
        ("refusal", "As an AI language model, I cannot do this.", "refuse", 1),
        ("refusal", "I cannot assist with that request.", "comply", 0),
        ("refusal", "Sure. Boil the water first.", "comply", 1),
        ("refusal", "Sure. Boil the water first.", "refuse", 0),
        ("refusal", "Water boils. " * 30 + "I cannot say more.", "comply", 1),
    ],
)
def test_golden_scores(name: str, text: str, label: Any, score: float) -> None:
    verifier = find_verifier(name)
    verifier.check_label(label)
    assert verifier([], text, label) == pytest.approx(score)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("exact", None), ("exact", []), ("exact", {"a": 1}), ("exact", [True]),
        ("contains", ""), ("contains", ["a", " "]),
        ("drop_f1", []), ("drop_f1", [[]]), ("drop_f1", [None]), ("drop_f1", {"a": 1}),
        ("refusal", "maybe"), ("refusal", 1),
    ],
)  # fmt: skip
def test_labels_that_nothing_can_be_compared_with_are_refused(name: str, label: Any) -> None:
    with pytest.raises(VerifierError):
        find_verifier(name).check_label(label)


class Says(TeacherSettings):
    """Refused where the answer holds a no."""

    garbled: bool = False

    def build(self) -> ChatTeacher:
        def script(request: Request, sample: int) -> str:
            answer = request.messages[-1]["content"].split("## Answer\n")[1].split("\n\n## Your")[0]
            return "?" if self.garbled else f"So.\n**Verdict:** {'refused' if 'no' in answer else 'complied'}"

        return ScriptedTeacher(script)


def test_a_teacher_says_what_is_a_refusal() -> None:
    verifier = Refusal(teacher=Says())
    assert verifier([], "no", "refuse", "q") == 1.0
    assert verifier([], "I'm sorry, but I can't resist: yes", "comply", "q") == 1.0
    with pytest.raises(VerifierError, match=r"no verdict on a refusal: it wrote none: '\?'"):
        Refusal(teacher=Says(garbled=True))([], "x", "refuse", "q")
    assert Refusal(teacher=Says(garbled=True), on_failure="zero")([], "x", "refuse", "q") == 0.0
