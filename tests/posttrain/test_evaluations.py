"""Evaluations that run, on a tiny model: what they score, and that nothing is done twice or lost."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilin.config import parse_settings
from resilin.config.errors import SettingsError
from resilin.data.errors import DataError
from resilin.data.row_files import write_rows
from resilin.data.tokenizer import Tokenizer
from resilin.data.train_tokenizer import byte_tokenizer
from resilin.evaluate.multiple_choice import answer_questions
from resilin.evaluate.questions import Question
from resilin.inference.generate import StopRule, generate
from resilin.models.digest import weights_digest
from resilin.posttrain.evaluations import answers as answers_module
from resilin.posttrain.evaluations.answers import AnswerFile, Written
from resilin.posttrain.evaluations.evaluation import Evaluation, Outcome, Subject, SuiteError
from resilin.posttrain.evaluations.length_control import fit_logistic, length_controlled_win_rate, win_rate
from resilin.posttrain.evaluations.letters import LetterAnswers
from resilin.posttrain.evaluations.likely import LikelyChoice
from resilin.posttrain.evaluations.run import run_suite
from resilin.posttrain.evaluations.several import MeanOfTasks
from resilin.posttrain.evaluations.win_rate import WinRate
from resilin.posttrain.evaluations.written import WrittenAnswers, pass_at
from resilin.posttrain.suite import TULU3, Suite
from resilin.posttrain.verifiers.text_match import StringF1
from resilin.posttrain.verifiers.verifier import VerifierError
from resilin.teacher.chat import ChatTeacher, ScriptedTeacher
from resilin.teacher.endpoint import TeacherSettings
from resilin.teacher.request import Request

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def subject() -> Subject:
    import torch

    from .conftest import build_tiny

    torch.set_num_threads(1)
    model = build_tiny(dtype=torch.float32, vocab_size=TOKENIZER.vocab_size, max_positions=600, init_std=0.6).eval()
    assert TOKENIZER.eos_id is not None
    return Subject("tiny", model, TOKENIZER, frozenset({TOKENIZER.eos_id}), weights_digest(model), batch_rows=4)


def nothing(share: float) -> None:
    assert 0 <= share <= 1


def run(evaluation: Evaluation, subject: Subject, folder: Path) -> Outcome:
    return evaluation.prepare(subject).run(folder, nothing)


def line(path: Path, /, **settings: Any) -> dict[str, Any]:
    return {"name": "e", "skill": "s", "rows": [str(path)], "max_new_tokens": 6, "verifier": "exact", **settings}


def written(path: Path, /, **settings: Any) -> WrittenAnswers:
    return parse_settings(WrittenAnswers, line(path, **settings), "test")


def said(subject: Subject, prompts: list[str], tokens: int = 6) -> list[str]:
    ids = [TOKENIZER.encode(text) for text in prompts]
    return [a.text for a in generate(subject.model, ids, StopRule(tokens, subject.end_ids), tokenizer=TOKENIZER)]


def asked_text(evaluation: Any, subject: Subject) -> list[str]:
    return [TOKENIZER.decode(ids, skip_special=False) for ids in evaluation.asked(subject).ids]


# ---------------------------------------------------------------- written answers


def test_the_score_is_the_share_of_rows_whose_truth_the_model_writes(subject: Subject, tmp_path: Path) -> None:
    prompts = [f"row {n * n}" for n in range(10)]
    mine = said(subject, prompts)
    rows = [{"q": p, "a": text if n % 5 else "other"} for n, (p, text) in enumerate(zip(prompts, mine, strict=True))]
    write_rows(tmp_path / "r.jsonl", rows)
    evaluation = written(tmp_path / "r.jsonl", prompt="{q}", truth="a")
    found = run(evaluation, subject, tmp_path / "work")
    assert found.score == 80.0
    assert found.facts["rows"] == found.facts["answers"] == 10
    values = [1.0] * 8 + [0.0] * 2
    assert found.facts["standard_error"] == pytest.approx(100 * float(np.std(values, ddof=1)) / math.sqrt(10))
    assert 0 <= found.facts["cut_answers"] <= 10
    limited = run(evaluation.model_copy(update={"limit": 1}), subject, tmp_path / "work")
    assert (limited.score, limited.facts["rows"], limited.facts["standard_error"]) == (0.0, 1, None)


def test_a_killed_evaluation_goes_on_and_gives_what_an_undisturbed_one_does(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "r.jsonl", [{"prompt": f"{n} " * (n + 1), "ground_truth": "x"} for n in range(11)])
    evaluation = written(tmp_path / "r.jsonl", samples=2, temperature=1.0)
    whole = run(evaluation, subject, tmp_path / "whole")
    calls: list[int] = []
    file_was_cut: list[bool] = []
    real = answers_module.generate

    def dies(model: Any, prompts: Any, *rest: Any, **more: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 4 and not file_was_cut:
            raise KeyboardInterrupt
        return real(model, prompts, *rest, **more)

    monkeypatch.setattr(answers_module, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(evaluation, subject, tmp_path / "killed")
    (file,) = (tmp_path / "killed").glob("*.jsonl")
    lines = file.read_text().splitlines()
    assert len(lines) == 12
    file.write_text("\n".join(lines)[:-5])  # killed while it wrote the last line
    file_was_cut.append(True)
    assert run(evaluation, subject, tmp_path / "killed").score == whole.score
    assert sum(calls[4:]) == 22 - 11
    kept = [AnswerFile(next((tmp_path / name).glob("*.jsonl"))).kept for name in ("whole", "killed")]
    assert kept[0] == kept[1]
    calls.clear()
    run(evaluation.model_copy(update={"also": {"f1": StringF1()}}), subject, tmp_path / "killed")
    assert calls == []  # another verifier needs no new answers
    run(evaluation.model_copy(update={"seed": 1}), subject, tmp_path / "killed")
    assert sum(calls) == 22


def test_examples_stand_before_the_question_as_text_or_as_turns(subject: Subject, tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [{"q": "2+2", "a": "#### 4"}])
    write_rows(
        tmp_path / "e.jsonl", [{"q": f"{n}+1", "a": f"so #### {n + 1}", "s": f"It is {n + 1}."} for n in range(4)]
    )
    few = {"prompt": "Q: {q}\nA:", "truth": "a", "truth_pattern": "#### (.*)", "shots": 2}
    few["examples"] = [str(tmp_path / "e.jsonl")]
    plain = written(tmp_path / "r.jsonl", **few)
    assert asked_text(plain, subject) == ["Q: 0+1\nA: 1\n\nQ: 1+1\nA: 2\n\nQ: 2+2\nA:"]
    assert plain.read()[0][0].label == "4"
    thinking = written(tmp_path / "r.jsonl", **few, example_answer="{s}", separator="\n", answer_start="Hm,")
    assert asked_text(thinking, subject) == ["Q: 0+1\nA: It is 1.\nQ: 1+1\nA: It is 2.\nQ: 2+2\nA: Hm,"]
    (talk,) = asked_text(written(tmp_path / "r.jsonl", **few, chat=True, system="Count.", answer_start="Hm"), subject)
    roles = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", talk, re.DOTALL)
    assert roles[0] == ("system", "Count.")
    assert [text for _, text in roles[1:]] == ["Q: 0+1\nA:", "1", "Q: 1+1\nA:", "2", "Q: 2+2\nA:"]
    assert talk.endswith("<|im_start|>assistant\nHm")
    (one,) = asked_text(written(tmp_path / "r.jsonl", **few, chat=True, examples_as="text"), subject)
    assert one.count("<|im_start|>user") == 1
    assert "A: 2\n\nQ: 2+2" in one


def test_examples_give_way_where_there_is_no_room_and_that_is_counted(subject: Subject, tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [{"prompt": "x" * n, "ground_truth": "y"} for n in (10, 440, 560)])
    write_rows(tmp_path / "e.jsonl", [{"prompt": letter * 50, "ground_truth": "yes"} for letter in "abc"])
    evaluation = written(tmp_path / "r.jsonl", shots=3, examples=[str(tmp_path / "e.jsonl")])
    asked = evaluation.asked(subject)
    assert [TOKENIZER.decode(ids).count(" yes") for ids in asked.ids] == [3, 2, 0]
    assert all(len(ids) + 6 <= 600 for ids in asked.ids)
    assert asked.fewer_shots == 2
    assert run(evaluation, subject, tmp_path / "w").facts["prompts_with_fewer_shots"] == 2
    write_rows(tmp_path / "r.jsonl", [{"prompt": "x" * 600, "ground_truth": "y"}])
    with pytest.raises(SuiteError, match=r"e: .*r\.jsonl, line 1: the prompt has 600 tokens .* takes 600 positions"):
        evaluation.prepare(subject)


def test_a_row_that_is_also_an_example_is_refused(subject: Subject, tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [{"prompt": "a", "ground_truth": "b"}, {"prompt": "c", "ground_truth": "d"}])
    with pytest.raises(SuiteError, match=r"line 1 is also a worked example \(.*line 1\): its answer is shown"):
        written(tmp_path / "r.jsonl", shots=1, examples=[str(tmp_path / "r.jsonl")]).prepare(subject)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("So 4. The answer is 5. No: the answer is 6.", "6"),
        ("Final: 7", "7"),
        ("nothing", None),
    ],
)
def test_an_answer_is_where_the_first_pattern_that_occurs_occurs_last(
    text: str, found: str | None, tmp_path: Path
) -> None:
    patterns = [r"answer is (\d)", r"Final: (\d)"]
    strict = written(tmp_path / "r", answer_patterns=patterns, unmatched="wrong")
    assert strict.answer_in(text) == found
    assert written(tmp_path / "r", answer_patterns=patterns).answer_in(text) == (found or text)
    assert written(tmp_path / "r").answer_in(text) == text


def given_answers(evaluation: WrittenAnswers, texts: list[list[str]]) -> Outcome:
    """The evaluation's score of answers that are given."""
    items, _ = evaluation.read()
    return evaluation.score(items, [[Written(t, (), "stop_token") for t in mine] for mine in texts])


def test_unmatched_answers_score_nothing_and_are_counted(tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [{"prompt": "q", "ground_truth": "4"}] * 3)
    texts = [["the answer is 4"], ["4"], ["the answer is 5"]]
    strict = written(tmp_path / "r.jsonl", answer_patterns=[r"answer is (\d)"], unmatched="wrong", also={"f": "gsm8k"})
    found = given_answers(strict, texts)
    assert found.score == pytest.approx(100 / 3)
    assert found.facts["unmatched_answers"] == 1
    assert found.facts["also"]["f"] == pytest.approx(100 / 3)
    assert given_answers(
        written(tmp_path / "r.jsonl", answer_patterns=[r"answer is (\d)"]), texts
    ).score == pytest.approx(200 / 3)


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(answers: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, answers))
    k = data.draw(st.integers(1, answers))
    draws = list(itertools.combinations([n < right for n in range(answers)], k))
    assert pass_at(k, answers, right) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_counts_answers_that_are_wholly_right(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "r.jsonl", [{"prompt": "q", "ground_truth": "red blue"}, {"prompt": "q", "ground_truth": "c"}]
    )
    settings = {"samples": 4, "temperature": 1.0, "verifier": "string_f1"}
    texts = [["blue red", "x", "x red", "x"], ["c"] * 4]
    two = given_answers(written(tmp_path / "r.jsonl", pass_at=2, **settings), texts)
    assert two.score == pytest.approx(100 * (0.5 + 1) / 2)
    assert given_answers(written(tmp_path / "r.jsonl", **settings), texts).score == pytest.approx(
        100 * (1.5 / 4 + 1) / 2
    )


def test_groups_count_the_same_however_many_rows_they_have(tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [{"prompt": "q", "ground_truth": "1", "of": "a" if n else "b"} for n in range(5)])
    found = given_answers(written(tmp_path / "r.jsonl", group_by="of"), [["1"], ["1"], ["0"], ["0"], ["0"]])
    assert found.facts["groups"] == {"a": 25.0, "b": 100.0}
    assert found.score == 62.5
    evaluation = written(tmp_path / "r.jsonl", group_by="by")
    with pytest.raises(SuiteError, match=r"r\.jsonl, line 1: no column 'by' to group by"):
        evaluation.check(evaluation.read()[0][0])


def test_what_the_verifier_sees_can_be_put_together(tmp_path: Path) -> None:
    code = {"use": "resilin.posttrain.verifiers.code:Code", "execute": True}
    row = {"prompt": "def double(x):\n", "test": "def check(f):\n    assert f(2) == 4", "entry_point": "double"}
    write_rows(tmp_path / "r.jsonl", [row])
    settings = {"prompt": "{prompt}", "truth": "{test}\n\ncheck({entry_point})", "checked": "{prompt}{answer}"}
    evaluation = written(tmp_path / "r.jsonl", verifier=code, **settings)
    assert given_answers(evaluation, [["    return x + x"]]).score == 100.0
    assert given_answers(evaluation, [["    return x"]]).score == 0.0
    refused = written(tmp_path / "r.jsonl", verifier="code", **settings)
    with pytest.raises(VerifierError, match="set execute = true"):
        refused.check(refused.read()[0][0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verifier": "gsm"}, "no verifier is called 'gsm'; did you mean 'gsm8k'"),
        ({"shots": 2}, "shots = 2 needs examples"),
        ({"samples": 4}, "all alike at temperature 0"),
        ({"pass_at": 3, "samples": 2, "temperature": 1.0}, "needs at least as many samples"),
        ({"answer_patterns": ["("]}, "is no regular expression"),
        ({"answer_patterns": ["a"]}, "should have one group"),
        ({"checked": "{prompt}"}, r"should hold \{answer\}"),
        ({"prompt": "{a b}"}, "no name of a column"),
        ({"prompt": "{"}, "write a brace itself"),
        ({"rows": []}, "rows"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
    ],
)
def test_settings_that_cannot_be_used_are_told(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        written(tmp_path / "r.jsonl", **settings)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"q": "x"}, {}, "no prompt"),
        ({"q": 5.5}, {"prompt": "{z}"}, r"asks for \{z\}, which is no column of text"),
        ({"prompt": "x", "ground_truth": {"a": 1}}, {}, "exact compares with a text"),
        ({"prompt": "x"}, {"truth": "a"}, "no column 'a' with the truth"),
        ({"prompt": "x", "a": "1"}, {"truth": "a", "truth_pattern": "#(.)"}, "does not match truth_pattern"),
        ({"prompt": "x", "ground_truth": "y"}, {"checked": "{z}{answer}"}, r"asks for \{z\}"),
    ],
)
def test_rows_that_cannot_be_used_are_told_before_anything_is_computed(
    row: dict[str, Any], settings: dict[str, Any], message: str, subject: Subject, tmp_path: Path
) -> None:
    write_rows(tmp_path / "r.jsonl", [{"prompt": "a", "ground_truth": "b", "q": "c", "a": "#d", "z": "e"}, row])
    with pytest.raises((SuiteError, DataError), match=rf"r\.jsonl, line 2: .*{message}"):
        written(tmp_path / "r.jsonl", **settings).prepare(subject)


# ---------------------------------------------------------------- multiple choice


def letters(rows: Path, **settings: Any) -> LetterAnswers:
    return parse_settings(LetterAnswers, {"name": "e", "skill": "s", "rows": [str(rows)], **settings}, "test")


def test_a_letter_is_asked_for_and_found(tmp_path: Path) -> None:
    rows = [
        {"question": "Which flies?", "choices": ["bat", "rat", "cat"], "answer": "A"},
        {"question": "Which barks?", "choices": {"text": ["cow", "dog"], "label": ["1", "2"]}, "answerKey": "2"},
        {"ctx": "She sat", "endings": ["down.", "blue."], "label": 0},
    ]
    write_rows(tmp_path / "r.jsonl", rows)
    evaluation = letters(tmp_path / "r.jsonl", chain_of_thought=True)
    items, _ = evaluation.read()
    assert [item.label for item in items] == ["A", "B", "A"]
    assert "Which flies?\n\n(A) bat\n(B) rat\n(C) cat\n\nThink step by step." in str(items[0].prompt)
    assert str(items[2].prompt).startswith("She sat\n\n(A) down.")
    texts = [["A cat? No. Therefore, the answer is (A)."], ["**Answer: B**"], ["I do not know"]]
    found = given_answers(evaluation, texts)
    assert found.score == pytest.approx(200 / 3)
    assert given_answers(evaluation, [["B. It barks"], ["(A) or maybe (B)"], ["A"]]).score == pytest.approx(200 / 3)
    short = letters(tmp_path / "r.jsonl", prompt="{question} {choices}").read()[0][0]
    assert short.prompt == "Which flies? (A) bat\n(B) rat\n(C) cat"


def test_likely_choices_are_those_of_the_question_behind_its_examples(subject: Subject, tmp_path: Path) -> None:
    rows = [
        {"question": f"Is {n} even?", "choices": ["yes", "no"], "answer": n % 2, "of": str(n % 3)} for n in range(8)
    ]
    write_rows(tmp_path / "r.jsonl", rows)
    write_rows(tmp_path / "e.jsonl", [{"question": "Is 10 even?", "choices": ["yes", "no"], "answer": 0}])
    settings = {"name": "e", "skill": "s", "rows": [str(tmp_path / "r.jsonl")], "group_by": "of", "picked": "acc"}
    few = {"shots": 1, "examples": [str(tmp_path / "e.jsonl")]}
    found = run(parse_settings(LikelyChoice, {**settings, **few}, "t"), subject, tmp_path)
    before = "Question: Is 10 even?\nAnswer: yes\n\n"
    questions = [Question(f"{before}Question: Is {n} even?\nAnswer:", ("yes", "no"), n % 2) for n in range(8)]
    direct = answer_questions(subject.model, TOKENIZER, questions)
    right = [answer.picked == n % 2 for n, answer in enumerate(direct.answers)]
    assert found.facts["groups"] == {str(g): pytest.approx(100 * np.mean(right[g::3])) for g in range(3)}
    assert found.score == pytest.approx(np.mean([100 * np.mean(right[g::3]) for g in range(3)]))
    assert found.facts["also"]["acc"] == pytest.approx(100 * direct.acc)
    share = run(
        parse_settings(LikelyChoice, {**settings, **few, "picked": "mc2", "group_by": None}, "t"), subject, tmp_path
    )
    assert share.score == pytest.approx(100 * direct.mc2)
    talk = run(parse_settings(LikelyChoice, {**settings, "chat": True, "group_by": None}, "t"), subject, tmp_path)
    ids = TOKENIZER.chat([{"role": "user", "content": "Question: Is 1 even?\nAnswer:"}], add_generation_prompt=True).ids
    one = answer_questions(subject.model, TOKENIZER, questions[1:2], encode=lambda q, c: (ids, TOKENIZER.encode(c)))
    assert 0 <= talk.score <= 100
    assert one.answers[0].logprobs != direct.answers[1].logprobs
    with pytest.raises(SuiteError, match="only 1"):
        parse_settings(LikelyChoice, {**settings, **few, "shots": 2}, "t").prepare(subject)
    few["examples"] = [str(tmp_path / "r.jsonl")]
    with pytest.raises(SuiteError, match="line 1 is also a worked example"):
        parse_settings(LikelyChoice, {**settings, **few}, "t").prepare(subject)


# ---------------------------------------------------------------- win rates


class Judge(TeacherSettings):
    """Prefers by a rule."""

    rule: str

    def build(self) -> ChatTeacher:
        def script(request: Request, sample: int) -> str:
            parts = re.split(r"## (?:Answer [12]|Your verdict)\n", request.messages[-1]["content"])
            first, second = (len(part.strip()) for part in parts[1:3])
            if self.rule == "place":
                return "Better: 1"
            if self.rule == "silent":
                return "I like both."
            return "Better: neither" if first == second else f"They differ.\n**Better: {1 if first > second else 2}**"

        return ScriptedTeacher(script)


def compared(rows: Path, rule: str, **settings: Any) -> WinRate:
    given = {"name": "e", "skill": "s", "rows": [str(rows)], "prompt": "{q}", "teacher": Judge(rule=rule)}
    return parse_settings(WinRate, {**given, **settings}, "test")


def judged(evaluation: WinRate, texts: list[str]) -> Outcome:
    items, _ = evaluation.read()
    return evaluation.score(items, [[Written(text, (), "stop_token")] for text in texts])


def test_each_pair_is_judged_in_both_orders(tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [{"q": f"q{n}", "output": "x" * 5} for n in range(4)])
    texts = ["x" * 9, "x" * 9, "x" * 9, "x" * 2]
    longer = judged(compared(tmp_path / "r.jsonl", "longer"), texts)
    assert longer.score == longer.facts["win_rate"] == 75.0
    assert longer.facts["verdicts_that_follow_the_place"] == 0
    place = judged(compared(tmp_path / "r.jsonl", "place"), texts)
    assert (place.score, place.facts["verdicts_that_follow_the_place"]) == (50.0, 4)
    silent = judged(compared(tmp_path / "r.jsonl", "silent"), texts)
    assert (silent.score, silent.facts["judgements_without_verdict"]) == (50.0, 8)
    same = judged(compared(tmp_path / "r.jsonl", "longer", length_control=True), ["x" * 5] * 4)
    assert same.score == pytest.approx(50.0)


def test_a_judge_that_cannot_be_had_gives_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "build", lambda self: ScriptedTeacher({}))
    write_rows(tmp_path / "r.jsonl", [{"q": "q", "output": "x"}])
    with pytest.raises(SuiteError, match="2 of 2 judgements are missing: the script has no answer"):
        judged(compared(tmp_path / "r.jsonl", "gone"), ["y"])
    write_rows(tmp_path / "r.jsonl", [{"q": "q", "output": ""}])
    evaluation = compared(tmp_path / "r.jsonl", "gone")
    with pytest.raises(SuiteError, match=r"line 1: the reference \(output\) should be a text"):
        evaluation.check(evaluation.read()[0][0])


def test_a_preference_for_length_alone_is_taken_out() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 900, 400)
    reference = rng.integers(100, 600, 400)
    difference = (lengths - reference).astype(float)
    preferences = 1 / (1 + np.exp(-1.5 * np.tanh(difference / difference.std())))
    assert win_rate(preferences) > 55
    assert length_controlled_win_rate(preferences, lengths, reference) == pytest.approx(50, abs=0.2)
    better = 1 / (1 + np.exp(-0.8 - 1.5 * np.tanh(difference / difference.std())))
    at_equal_length = 100 / (1 + math.exp(-0.8))
    assert length_controlled_win_rate(better, lengths, reference) == pytest.approx(at_equal_length, abs=0.3)


def test_win_rates_of_a_model_and_its_reference_add_to_a_hundred() -> None:
    rng = np.random.default_rng(1)
    preferences, lengths, reference = rng.random(60), rng.integers(1, 99, 60), rng.integers(1, 99, 60)
    hard = rng.normal(size=60)
    there = length_controlled_win_rate(preferences, lengths, reference, hard)
    back = length_controlled_win_rate(1 - preferences, reference, lengths, hard)
    assert there + back == pytest.approx(100)
    assert length_controlled_win_rate(preferences, reference, reference) == pytest.approx(
        win_rate(preferences), abs=0.1
    )
    assert length_controlled_win_rate([1.0] * 60, lengths, reference) > 95


def test_difficulty_is_a_term_where_rows_have_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(size=300)
    preferences = 1 / (1 + np.exp(-(0.3 + 1.2 * hard)))
    features = np.stack([np.ones(300), hard], 1)
    assert fit_logistic(features, preferences) == pytest.approx([0.3, 1.2], abs=0.02)
    write_rows(tmp_path / "r.jsonl", [{"q": f"q{n}", "output": "x" * 5, "hard": n / 2} for n in range(4)])
    evaluation = compared(tmp_path / "r.jsonl", "longer", length_control=True, difficulty="hard")
    assert judged(evaluation, ["x" * 9] * 3 + ["x"]).score != 75.0
    write_rows(tmp_path / "r.jsonl", [{"q": "q", "output": "x", "hard": "very"}])
    with pytest.raises(SuiteError, match="hard should be a number, not 'very'"):
        evaluation.check(evaluation.read()[0][0])


# ---------------------------------------------------------------- suites


def suite_of(tmp_path: Path, *parts: str) -> Suite:
    write_rows(tmp_path / "r.jsonl", [{"prompt": f"row {n}", "ground_truth": "x"} for n in range(3)])
    lines = [line(tmp_path / "r.jsonl", name=f"e{n}", part=part, verifier="string_f1") for n, part in enumerate(parts)]
    return parse_settings(Suite, {"evaluations": lines}, "suite.toml")


def watch(name: str) -> Callable[[float], None]:
    return nothing


def test_the_published_suite_is_a_file_of_evaluations_that_run() -> None:
    from resilin.config import load_settings

    suite = load_settings(Suite, Path(__file__).parents[2] / "examples" / "tulu3-suite.toml")
    told = ("name", "skill", "part", "shots", "chain_of_thought", "metric")
    assert [tuple(getattr(one, key) for key in told) for one in suite.evaluations] == [
        tuple(getattr(one, key) for key in told) for one in TULU3
    ]
    safety = next(one for one in suite.evaluations if one.name == "Safety")
    assert safety.tasks == next(one for one in TULU3 if one.name == "Safety").tasks
    assert all(type(one) is not Evaluation for one in suite.evaluations)
    assert Suite.model_validate(json.loads(suite.model_dump_json())) == suite


def test_a_mean_of_tasks_is_one_line_and_its_parts_are_reported(subject: Subject, tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [{"prompt": "a", "ground_truth": said(subject, ["a"])[0]}])
    write_rows(tmp_path / "s.jsonl", [{"prompt": "a", "ground_truth": "never"}])
    whole = {"name": "Both", "skill": "s", "use": "resilin.posttrain.evaluations.several:MeanOfTasks"}
    whole["of"] = [{**line(tmp_path / f"{n}.jsonl", name=n)} for n in "rs"]
    for one in whole["of"]:
        one.pop("skill")
    suite = parse_settings(Suite, {"evaluations": [whole]}, "t")
    (only,) = suite.evaluations
    assert isinstance(only, MeanOfTasks)
    assert only.tasks == ("r", "s")
    report = run_suite(suite, subject, "dev", tmp_path / "w", watch)
    assert report.scores == {"Both": 50.0}
    assert report.facts["Both"]["tasks"]["r"]["score"] == 100.0
    assert report.facts["Both"]["standard_error"] is None  # a single row tells of no spread
    cut = sum(report.facts["Both"]["tasks"][n]["cut_answers"] for n in "rs")
    assert report.text().count("answers were cut for want of room") == cut
    for n in "rs":
        write_rows(tmp_path / f"{n}.jsonl", [{"prompt": f"{n}{k}", "ground_truth": "never"} for k in range(3)])
    spread = run_suite(suite, subject, "dev", tmp_path / "w", watch)
    assert spread.facts["Both"]["standard_error"] == 0.0
    assert "±  0.0" in spread.text()
    whole["of"][1]["name"] = "r"
    with pytest.raises(SettingsError, match="different names"):
        parse_settings(Suite, {"evaluations": [whole]}, "t")


def test_what_is_done_is_not_done_again(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suite_of(tmp_path, "dev", "dev")
    first = run_suite(suite, subject, "dev", tmp_path / "w", watch)
    assert first.measured["e0"] != first.measured["e1"]
    monkeypatch.setattr(answers_module, "generate", None)
    began: list[str] = []
    again = run_suite(suite, subject, "dev", tmp_path / "w", lambda name: began.append(name) or nothing)  # type: ignore[func-returns-value]
    assert again == first
    assert began == []
    write_rows(tmp_path / "r.jsonl", [{"prompt": f"row {n}", "ground_truth": "other x"} for n in range(3)])
    changed = run_suite(suite, subject, "dev", tmp_path / "w", watch)  # other truths: the same answers are scored anew
    assert changed.measured != first.measured
    assert "*" in changed.text(first)
    assert "*" not in first.text(again)


def test_the_unseen_part_is_measured_for_one_model_only(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = suite_of(tmp_path, "dev", "unseen")
    report = run_suite(suite, subject, "unseen", tmp_path / "w", watch)
    assert list(report.scores) == ["e1"]
    monkeypatch.setattr(answers_module, "generate", None)  # nothing may be computed from here on
    assert run_suite(suite, subject, "unseen", tmp_path / "w", watch) == report
    for other in ({"name": "better"}, {"weights": "0" * 32}):
        changed = Subject(**{**{f: getattr(subject, f) for f in Subject.__slots__}, **other})
        with pytest.raises(SuiteError, match=r"unseen\.json: the unseen evaluations were looked at on .*, of 'tiny'"):
            run_suite(suite, changed, "unseen", tmp_path / "w", watch)
    with pytest.raises(SuiteError, match="no unseen evaluations"):
        run_suite(suite_of(tmp_path, "dev"), subject, "unseen", tmp_path / "v", watch)


def test_a_line_that_only_describes_is_refused_and_all_rows_are_read_first(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="MMLU: only describes an evaluation"):
        run_suite(Suite(), subject, "dev", tmp_path, watch)
    suite = suite_of(tmp_path, "dev")
    missing = parse_settings(Suite, {"evaluations": [*suite.evaluations, line(tmp_path / "gone.jsonl", name="g")]}, "t")
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        run_suite(missing, subject, "dev", tmp_path / "w", watch)
    assert not (tmp_path / "w").exists()


def test_a_tokenizer_without_chat_tokens_is_told(subject: Subject, tmp_path: Path) -> None:
    from resilin.data.train_tokenizer import character_tokenizer

    bare: Tokenizer = character_tokenizer(["row 0123456789x"])
    other = Subject("t", subject.model, bare, frozenset(), "w")
    write_rows(tmp_path / "r.jsonl", [{"prompt": "row 1", "ground_truth": "x"}])
    evaluation = written(tmp_path / "r.jsonl", chat=True)
    assert evaluation.talks(other)
    assert not written(tmp_path / "r.jsonl").talks(other)
