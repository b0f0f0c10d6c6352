"""The checks of instruction following."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from resilin.posttrain.verifiers.ifeval import IfEval, loose_forms
from resilin.posttrain.verifiers.ifeval_checks import CHECKS
from resilin.posttrain.verifiers.ifeval_instructions import INSTRUCTIONS, add_instruction
from resilin.posttrain.verifiers.verifier import VerifierError

OLD: list[tuple[str, dict[str, Any], str, str]] = [
    ("verify_keywords", {"keyword_list": ["Red", "sky"]}, "the SKY was reddish", "the sky was blue"),
    ("verify_keyword_frequency", {"word": "cat", "N": 2}, "Cat, cat! cats", "cat cat cat"),
    ("validate_forbidden_words", {"forbidden_words": ["bad"]}, "all good", "a Badger"),
    ("verify_letter_frequency", {"letter": "a", "N": 2}, "banAna", "banana"),
    (
        "validate_response_language",
        {"language": "de"},
        "Das ist ein ganz gewöhnlicher deutscher Satz über das Wetter von morgen.",
        "This is quite an ordinary English sentence about the weather of tomorrow.",
    ),
    ("verify_paragraph_count", {"N": 2}, "one\n  * * *  \ntwo", "one\n* * *\n"),
    ("validate_word_constraint", {"N": 20, "quantifier": "around"}, "w " * 22, "w " * 23),
    ("validate_word_constraint", {"N": 2, "quantifier": "at least"}, "a b", "a"),
    ("validate_word_constraint", {"N": 2, "quantifier": "at most"}, "a b", "a b c"),
    ("validate_word_constraint", {"N": 2, "quantifier": "at most"}, "a", "a b c d"),
    ("verify_sentence_constraint", {"N": 2, "quantifier": "at most"}, "Dr. Who came. He left!", "A. B? C! D."),
    ("verify_sentence_constraint", {"N": 4, "quantifier": "around"}, "One here. Two here. Three.", "One here. Two."),
    ("validate_paragraphs", {"N": 2, "first_word": "Then", "i": 2}, "First\n\n Then this", "Then\n\nFirst"),
    ("verify_postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. more", "Bye.\nP.S."),
    ("validate_placeholders", {"N": 2}, "[a] and [b]", "[a] and b"),
    ("verify_bullet_points", {"N": 2}, "* a\n - b\nc", "* a\nb"),
    ("validate_title", {}, "<<Joy>>\ntext", "<Joy>\ntext"),
    ("validate_choice", {"options": ["yes", "no"]}, "I say yes", "I say maybe"),
    ("validate_highlighted_sections", {"N": 2}, "*a* and *b*", "*a* and b"),
    ("validate_sections", {"N": 2, "section_splitter": "Section"}, "Section 1\nx\nSECTION 2", "Section\nSection 1"),
    ("validate_json_format", {}, '{"a": [1, 2]}', "{'a': 1}"),
    ("validate_repeat_prompt", {"original_prompt": "Say hi."}, "Say hi. Hi!", "Hi! Say hi."),
    ("validate_two_responses", {}, "one ****** two", "one ****** one"),
    ("validate_uppercase", {}, "LOUD 1!", "LOUd"),
    ("validate_lowercase", {}, "quiet 1!", "quieT"),
    ("validate_frequency_capital_words", {"N": 2, "quantifier": "at least"}, "A NEW Day", "a NEW Day"),
    ("validate_frequency_capital_words", {"N": 1, "quantifier": "at most"}, "a NEW Day", "A NEW DAY"),
    ("validate_end", {"end_phrase": "The end."}, "So. The end.", "The end. Or not"),
    ("validate_quotation", {}, '"quoted"', '"quoted" not'),
    ("validate_no_commas", {}, "none", "a, b"),
]

NEW: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["red", "sky"]}, "the SKY was Red", "the sky"),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, "cat Cats", "cat"),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"}, "cat", "cat cat"),
    ("keywords:forbidden_words", {"forbidden_words": ["bad"]}, "a badger", "Bad dog"),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 3, "let_relation": "at least"}, "bAnana", "bana"),
    (
        "language:response_language",
        {"language": "de"},
        "Das ist ein ganz gewöhnlicher deutscher Satz über das Wetter von morgen.",
        "This is quite an ordinary English sentence about the weather of tomorrow.",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "One here. Two.",
        "One here.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***\n", "a\n***\n***\nb"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a, b!", "a b c"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        'One\n\n"Then, two',
        "One\n\nAnd then",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\np. s. more", "Bye"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye\nP.P.S more", "Bye\nP.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n**b**"),
    ("detectable_format:constrained_response", {}, "Well. My answer is no.", "My answer is perhaps."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* **b**", "*a* ** **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Part", "num_sections": 2},
        "Part 1 x Part 2",
        "Part 1",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "no"),
    ("detectable_format:title", {}, "<<Joy>>", "<< >>"),
    ("combination:two_responses", {}, "a ****** b", "a ****** ****** b"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, " say HI. hi", "hi"),
    ("startend:end_checker", {"end_phrase": "The end."}, 'So. "the END."', "The end. no"),
    ("startend:quotation", {}, ' "q" ', '"'),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"}, "Ab c", "AB c"),
    ("change_case:english_capital", {}, "THIS IS AN ORDINARY ENGLISH SENTENCE.", "This is an ordinary one."),
    ("change_case:english_lowercase", {}, "this is an ordinary english sentence.", "This is an ordinary one."),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), OLD, ids=[f"{n}-{c[0]}" for n, c in enumerate(OLD)])
def test_one_constraint(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    if "language" in name:
        pytest.importorskip("langdetect")
    label = {"func_name": name, **arguments, "unused": None}
    before = copy.deepcopy(label)
    verifier = IfEval()
    for _ in range(2):  # a second epoch reads the same label
        assert verifier([], good, label) == 1.0
        assert verifier([], bad, label) == 0.0
    assert label == before
    assert verifier([], f"<think>no, A</think>{good}", json.dumps(label)) == 1.0


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), NEW, ids=[f"{n}-{c[0]}" for n, c in enumerate(NEW)])
def test_one_instruction(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    if "language" in name or "english" in name:
        pytest.importorskip("langdetect")
    label = [{"instruction_id": [name], "kwargs": [{**arguments, "unused": None}]}]
    assert IfEval()([], good, label) == 1.0
    assert IfEval()([], bad, repr(label)) == 0.0


def test_every_check_and_instruction_is_tried_here() -> None:
    assert {case[0] for case in OLD} == set(CHECKS)
    assert {case[0] for case in NEW} == set(INSTRUCTIONS)


def test_of_several_instructions_the_share_counts() -> None:
    label = {
        "instruction_id": ["punctuation:no_comma", "startend:quotation", "detectable_format:title"],
        "kwargs": [None, {}, None],
    }
    assert IfEval()([], '"<<T>> a, b"', label) == pytest.approx(2 / 3)
    assert IfEval(count="all")([], '"<<T>> a, b"', label) == 0.0
    assert IfEval(count="all")([], '"<<T>> a b"', json.dumps([label])) == 1.0
    assert IfEval()([], "", label) == 0.0
    assert IfEval()([], "<think>thoughts</think>", label) == 0.0


def test_loose_accuracy_forgives_a_line_around_the_answer() -> None:
    label = [{"instruction_id": ["startend:quotation"], "kwargs": [None]}]
    text = 'Sure, here it is:\n*"quoted"*\nHope it helps'
    assert IfEval()([], text, label) == 0.0
    assert IfEval(loose=True)([], text, label) == 1.0
    assert len(loose_forms(text)) == 8
    # Leaving everything out follows nothing.
    assert IfEval(loose=True)([], "a, b", [{"instruction_id": ["punctuation:no_comma"], "kwargs": [None]}]) == 0.0


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"func_name": "validate_nothing"}, "'validate_nothing' is no check"),
        ({"func_name": "verify_keyword_frequency", "word": "a"}, "missing here: N"),
        ({"instruction_id": ["no:such"], "kwargs": [None]}, "'no:such' is not known"),
        ({"instruction_id": ["startend:end_checker"], "kwargs": [{}]}, "missing here: end_phrase"),
        ({"instruction_id": ["punctuation:no_comma"], "kwargs": []}, None),
        ({"instruction_id": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "lists of one length"),
        ("{'a", "neither JSON nor a list"),
        (5, "needs a constraint"),
    ],
)
def test_labels_of_no_use_are_told(label: Any, message: str | None) -> None:
    if message is None:
        IfEval().check_label(label)
        return
    with pytest.raises(VerifierError, match=message):
        IfEval().check_label(label)


def test_instructions_can_be_added() -> None:
    add_instruction("mine:starts_with", lambda text, letter: text.startswith(letter), ["letter"])
    try:
        label = {"instruction_id": ["mine:starts_with"], "kwargs": [{"letter": "x"}]}
        assert IfEval()([], "xyz", label) == 1.0
    finally:
        del INSTRUCTIONS["mine:starts_with"]
