"""A real model: SmolLM2-135M-Instruct, where its package is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilin.evaluate.multiple_choice import answer_questions
from resilin.evaluate.perplexity import text_score
from resilin.evaluate.questions import parse_question
from resilin.inference.generate import StopRule, generate
from resilin.run.open_model import OpenedModel, open_model

pytestmark = pytest.mark.slow

PASSAGE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity."
)
SHUFFLED = " ".join(sorted(PASSAGE.split()))
QUESTIONS = [
    {"question": "What is the capital of France?", "choices": ["Paris", "Berlin", "Madrid"], "answer": 0},
    {"question": "Which gas do plants take in from the air?", "choices": ["oxygen", "carbon dioxide"], "answer": 1},
    {"ctx": "She opened the umbrella because it had started to", "endings": ["rain.", "sing.", "divide."], "label": 0},
    {
        "goal": "To keep ice cream from melting,",
        "sol1": "put it in the freezer.",
        "sol2": "put it in the oven.",
        "label": 0,
    },
    {"context": "Water freezes at zero degrees", "choices": ["Celsius", "of the bank", "Thursday"], "gold": 0},
]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> OpenedModel:
    return open_model(smollm2_gguf)


def test_a_famous_text_is_foretold_far_better_than_its_words_in_another_order(smollm2: OpenedModel) -> None:
    words = smollm2.needed_tokenizer()
    famous, shuffled = (text_score(smollm2.model, words, text) for text in (PASSAGE, SHUFFLED))
    assert famous.bytes == shuffled.bytes == len(PASSAGE)
    assert famous.bits_per_byte < 1.0 < shuffled.bits_per_byte


def test_easy_questions_are_answered_far_above_chance(smollm2: OpenedModel) -> None:
    questions = [parse_question(row) for row in QUESTIONS]
    got = answer_questions(smollm2.model, smollm2.needed_tokenizer(), questions)
    assert got.acc_norm >= 0.8 > 2 * got.chance - 0.1


def test_it_knows_the_capital_of_france_alone_and_in_a_batch(smollm2: OpenedModel) -> None:
    words = smollm2.needed_tokenizer()
    prompts = [words.encode(text) for text in ("The capital of France is", "Once upon a time, in a land far away,")]
    together = generate(smollm2.model, prompts, StopRule(6), tokenizer=words)
    alone = generate(smollm2.model, prompts[:1], StopRule(6), tokenizer=words)
    assert together[0].text.startswith(" Paris")
    assert alone[0].tokens == together[0].tokens
