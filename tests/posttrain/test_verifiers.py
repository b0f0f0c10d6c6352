"""What each verifier says of which answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from resilin.data.errors import DataError
from resilin.posttrain.verifiers import VerifierTable, find_verifier
from resilin.posttrain.verifiers.code import Code, last_code_block
from resilin.posttrain.verifiers.gsm8k import last_number
from resilin.posttrain.verifiers.table import KNOWN
from resilin.posttrain.verifiers.text_match import plain_words, word_f1
from resilin.posttrain.verifiers.verifier import Answer, Verifier, VerifierError


def score(name: str, text: str, label: Any, tokens: int = 0) -> float:
    return find_verifier(name)(list(range(tokens)), text, label, "")


@pytest.mark.parametrize(
    ("text", "label", "right"),
    [
        ("The answer is 42.", "42", True),
        ("She pays 1,234,567 dollars", "1234567", True),
        ("3, 4 and 1,2,3", "123", False),  # a comma is taken out between each two digits once: 12,3
        ("3, 4 and 1,2,3", "3", True),
        ("3.50", "3.5", False),
        ("12.0", "12", False),
        ("12", "12.0", False),
        ("10-3", "-3", True),
        ("10-3", "3", False),
        ("10 - 3", "3", True),
        ("+7", "7", False),
        ("+7", "+7", True),
        (".5", ".5", True),
        ("0.5", "0.5", True),
        ("x = -.25", "-.25", True),
        ("version 1.2.3", ".3", True),
        ("42 is the answer, found in 3 steps", "42", False),
        ("no number", "no number", True),
        ("No Number", "nO nUMBER", True),
        ("", "", True),
        ("", "4", False),
        ("4", 4, True),
        ("1e5", "5", True),
        ("\u0664\u0662", "\u0664\u0662", True),
    ],
)
def test_gsm8k_compares_the_last_number_as_it_is_written(text: str, label: Any, right: bool) -> None:
    assert score("gsm8k", text, label) == float(right)


def test_a_long_run_of_digits_is_one_number() -> None:
    assert last_number("7" * 5000) == "7" * 5000


@pytest.mark.parametrize(
    ("text", "label", "right"),
    [
        (r"so it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}", True),
        (r"first \boxed{3}, then \boxed{\frac{1}{2}}.", "1/2", True),
        (r"\boxed{3} and \boxed{4}", "3", False),
        (r"\boxed{\sqrt{2}+\{1\}}", r"\sqrt2+\{1\}", True),
        (r"I say \boxed 7$ here", "7", True),
        (r"\fbox{12}", "12", True),
        (r"\boxed{12", "12", False),
        (r"\boxed{0.5}", r"\frac12", True),
        (r"\boxed{.5}", "0.50", True),
        (r"\boxed{12.0}", "12", True),
        (r"\boxed{1,234}", "1234", True),
        (r"\boxed{90^\circ}", "90", True),
        (r"\boxed{50\%}", "50", True),
        (r"\boxed{3\text{ cm}}", "3", True),
        (r"\boxed{x = 5}", "5", True),
        (r"\boxed{\dfrac{3}{4}}", r"\tfrac34", True),
        (r"\boxed{\left(1,2\right]}", "(1,2]", True),
        (r"\boxed{(1,2)}", "(1,2]", False),
        ("Final Answer: The final answer is $12$. I hope it is correct.", "12", True),
        ("Final Answer: The final answer is $12$.", "12", True),
        ("Final Answer: The final answer is $x = 12$ cm. I hope it is correct.", "12", True),
        ("We get $3$ and then $x=4$.", "4", True),
        ("We get $3$ and then $x=4$.", "3", False),
        ("17", "17", True),
        ("the answer is 17", "17", False),
        ("", "17", False),
        (r"\boxed{\text{blue}}", r"\text{blue}", True),
    ],
)
def test_math_finds_and_compares_answers_as_strings_and_numbers(text: str, label: str, right: bool) -> None:
    from resilin.posttrain.verifiers.math import Math

    assert Math(symbolic=False)([], text, label) == float(right)
    if right:
        assert score("MATH", text, label) == 1.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+2x+2", False),
        (r"\frac{\pi}{2}", r"\pi/2", True),
        (r"1\frac{1}{2}", r"\frac{3}{2}", True),
        (r"\sin^2 x + \cos^2 x", "1", True),
        (r"\log_2 8", "3", True),
        (r"\{2, 1\}", r"\{1,2\}", True),
        ("(2,1)", "(1,2)", False),
        (r"\left(\frac{2}{4}, 3\right)", r"(\frac12,3)", True),
        (r"[0,\infty)", r"[0,\infty)", True),
        ("2x - 4 = y", "y + 4 = 2x", True),
        ("2x - 4 = y", "y = 2x", False),
        (r"\binom{5}{2}", "10", True),
        ("5!", "120", True),
        (r"|{-3}|", "3", True),
        (r"2^{10}", "1024", True),
        (r"\frac{1}{1+\sqrt{2}}", r"\sqrt{2}-1", True),
        ("__import__('os').system('true')", "0", False),
        (r"\frac{1}", "1", False),
        ("(((", "(((1", False),
        (r"\unknown{3}", "3", False),
        ("", "0", False),
    ],
)
def test_expressions_are_compared_by_value(one: str, other: str, same: bool) -> None:
    pytest.importorskip("sympy")
    from resilin.posttrain.verifiers.latex_expression import NotAnExpression, equal_expressions

    try:
        found = equal_expressions(one, other)
    except (NotAnExpression, RecursionError):
        found = False
    assert found is same


def test_a_comparison_that_takes_too_long_is_not_equal_and_the_next_one_works() -> None:
    pytest.importorskip("sympy")
    from resilin.posttrain.verifiers.symbolic import Symbolic

    compare = Symbolic(60.0)
    try:
        assert compare.equal(r"2\sqrt{3}", r"\sqrt{12}")
        compare.seconds = 0.4
        assert not compare.equal("9^{9^{9^{9}}}", "4")
        assert compare._process is None
        compare.seconds = 60.0  # a busy machine may be slow; only the hopeless comparison was to be cut short
        assert compare.equal("x+x", "2x")
        assert not compare.equal("x" * 500, "y")
        assert not compare.equal("9^{9^{9^{9}}}", "4")  # remembered
        assert compare._process is not None
    finally:
        compare.close()


@pytest.mark.parametrize(
    ("name", "text", "label", "value"),
    [
        ("flan", "I think. The answer is: The Big  cat!", "big cat", 1.0),
        ("flan", "big cat", "the big cat.", 1.0),
        ("flan", "The answer is: cat. The answer is: dog", "cat", 0.0),
        ("string_matcher", "so <answer> The Cat </answer>", "cat", 1.0),
        ("string_matcher", "so The Cat", "cat", 0.0),
        ("string_matcher", "<answer>dog</answer> no, <answer>cat</answer>", "cat", 1.0),
        ("string_f1", "<think>dog dog</think> a big cat", "the big dog", 0.5),
        ("string_f1", "nothing", "the big dog", 0.0),
        ("string_f1", "red", ["blue", "red"], 1.0),
    ],
)
def test_texts_are_compared_by_their_words(name: str, text: str, label: Any, value: float) -> None:
    assert score(name, text, label) == pytest.approx(value)


def test_f1_counts_words_as_bags() -> None:
    assert plain_words("An  apple, the APPLE!") == "apple apple"
    assert word_f1("b b b c", "b b d d") == pytest.approx(2 * 2 / 8)


@pytest.mark.parametrize(
    ("name", "tokens", "label", "value"),
    [
        ("max_length", 100, "100", 1.0),
        ("max_length", 100 + 4096, "100", 0.5),
        ("max_length", 0, 4096, 0.5),
        ("max_length", 20_000, "100", 0.0),
        ("up_to_max_length", 5, "100", 1.0),
        ("up_to_max_length", 100 + 2048, "100", 0.75),
    ],
)
def test_lengths_fall_off_linearly_and_never_below_zero(name: str, tokens: int, label: Any, value: float) -> None:
    assert score(name, "", label, tokens) == value


def test_code_is_not_run_unless_asked_for() -> None:
    with pytest.raises(VerifierError, match="set execute = true"):
        score("code", "x = 1", ["assert x == 1"])


def test_code_is_run_against_its_assertions() -> None:
    code = Code(execute=True)
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add('a', 'b') == 'ba'"]
    program = "def add(a, b):\n    print('[true, true]')\n    return a + b\n"
    text = f"First\n```python\nadd = None\n```\nthen\n```python\n{program}```"
    assert last_code_block(text).startswith("def add")
    assert code([], text, tests) == pytest.approx(2 / 3)
    assert code([], text, json.dumps(tests[:2])) == 1.0
    assert Code(execute=True, threshold=0.7)([], text, tests) == 0.0
    assert code([], "def add(a, b: syntax error", tests) == 0.0
    assert code([], "import sys; sys.exit(0)", tests) == 0.0
    several = [Answer((), f"x = {n}", ["assert x % 2 == 0", "assert x < 3"]) for n in range(7)]
    assert code.scores(several) == [code.score(answer) for answer in several] == [1.0, 0.5, 1.0, 0.0, 0.5, 0.0, 0.5]


def test_code_is_ended_by_its_limits() -> None:
    code = Code(execute=True, seconds=1.0, megabytes=200)
    assert code([], "while True: pass", ["assert True"]) == 0.0
    assert code([], "x = bytearray(10**9)", ["assert len(x)"]) == 0.0
    import os

    os.environ["RESILIN_TEST_SECRET"] = "1"
    try:
        assert code([], "import os", ["assert 'RESILIN_TEST_SECRET' not in os.environ"]) == 1.0
    finally:
        del os.environ["RESILIN_TEST_SECRET"]


class Vowels(Verifier):
    """One's own verifier."""

    least: int = 1

    def score(self, answer: Answer) -> float:
        return float(sum(letter in "aeiou" for letter in answer.text) >= self.least)


def test_a_table_takes_own_verifiers_by_import_path_and_weights() -> None:
    table = VerifierTable.model_validate(
        {
            "verifiers": {
                "vowels": {"use": f"{__name__}:Vowels", "least": 3, "weight": 0.5},
                "GSM8K": {"use": KNOWN["gsm8k"], "weight": 2.0},
            }
        }
    )
    prompt = {"messages": [{"role": "user", "content": "q"}]}
    assert table.score({**prompt, "ground_truth": "", "dataset": "vowels"}, [], "aeo") == 0.5
    assert table.score({**prompt, "ground_truth": "3", "dataset": "gsm8k"}, [], "3") == 2.0
    both = {**prompt, "ground_truth": ["", "3"], "dataset": ["vowels", "gsm8k"]}
    assert table.score(both, [], "aeo 3") == 2.5
    verl = {"prompt": prompt["messages"], "data_source": "flan", "reward_model": {"ground_truth": "yes"}}
    assert table.scores([both, verl], [[], []], ["aeo 4", "Yes."]) == [0.5, 1.0]


def test_rows_that_cannot_be_checked_are_refused_before_anything_is_generated() -> None:
    table = VerifierTable()
    row = {"prompt": "q", "ground_truth": "3", "dataset": "gsm8k"}
    table.check(row)
    with pytest.raises(VerifierError, match=r"no verifier is called 'gsm8j'; did you mean 'gsm8k'"):
        table.check({**row, "dataset": "gsm8j"})
    with pytest.raises(VerifierError, match=r"p\.jsonl, line 3: ifeval needs a constraint"):
        table.check({**row, "dataset": "ifeval", "ground_truth": {"x": 1}}, "p.jsonl, line 3")
    with pytest.raises(VerifierError, match=r"a length is a number of tokens"):
        table.check({**row, "dataset": "max_length", "ground_truth": "long"})
    with pytest.raises(DataError, match="no ground_truth"):
        table.check({"prompt": "q", "dataset": "gsm8k"})
    with pytest.raises(VerifierError, match="no verifier is called 'gsm8k'"):
        VerifierTable(known=False).check(row)


def test_a_score_outside_its_range_is_an_error() -> None:
    class Wild(Verifier):
        def score(self, answer: Answer) -> float:
            return 2.0

    table = VerifierTable.model_construct(verifiers={"wild": Wild()}, known=True)
    with pytest.raises(VerifierError, match=r"gave the score 2\.0"):
        table.score({"prompt": "q", "ground_truth": "", "dataset": "wild"}, [], "")
