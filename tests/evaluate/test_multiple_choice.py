"""Choices are scored as a plain computation with transformers scores them."""

from __future__ import annotations

import random

import pytest
import torch

from resilin.data.tokenizer import Tokenizer
from resilin.evaluate.multiple_choice import answer_questions, encode_pair, joined
from resilin.evaluate.questions import Question, QuestionError
from resilin.models.decoder import Decoder

WORDS = ["the", "quick", "fox", "lazy dog", "café", "猫", "answer is", "blue", "again and again", "x"]


def their_logprob(twins, tokenizer: Tokenizer, context: str, choice: str) -> float:
    """One choice at a time, without padding, batches or cache."""
    before = tokenizer.encode(context)
    whole = tokenizer.encode(f"{context} {choice}")
    with torch.no_grad():
        logprobs = twins.theirs(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return sum(float(logprobs[i - 1, whole[i]]) for i in range(len(before), len(whole)))


def random_questions(seed: int, count: int) -> list[Question]:
    draw = random.Random(seed)
    questions = []
    for _ in range(count):
        context = "The " + " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))
        choices = [" ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(draw.randint(2, 5))]
        questions.append(Question(context, tuple(choices), draw.randrange(len(choices))))
    return questions


def test_log_likelihoods_and_accuracies_equal_a_plain_computation_with_transformers(
    twins, tokenizer: Tokenizer
) -> None:
    questions = random_questions(0, 30)
    got = answer_questions(twins.ours, tokenizer, questions, batch_tokens=200)
    right = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    for question, answer in zip(questions, got.answers, strict=True):
        expected = [their_logprob(twins, tokenizer, question.context, choice) for choice in question.choices]
        assert answer.logprobs == pytest.approx(expected, abs=1e-3)
        for name, lengths in {
            "acc": [1] * len(expected),
            "acc_norm": [len(choice) for choice in question.choices],
            "acc_bytes": [len(choice.encode()) for choice in question.choices],
        }.items():
            values = [value / length for value, length in zip(expected, lengths, strict=True)]
            right[name] += values.index(max(values)) == question.gold
    assert {name: getattr(got, name) * 30 for name in right} == pytest.approx(right)
    assert len(set(right.values())) > 1  # else the three would not be told apart
    assert got.chance == pytest.approx(sum(1 / len(q.choices) for q in questions) / 30)


def test_any_batch_size_gives_the_same_log_likelihoods(twins, tokenizer: Tokenizer) -> None:
    questions = random_questions(1, 10)
    one, many = (answer_questions(twins.ours, tokenizer, questions, batch_tokens=n) for n in (1, 10_000))
    for a, b in zip(one.answers, many.answers, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_the_space_between_context_and_choice_belongs_to_the_choice() -> None:
    assert joined("The sky is", "blue") == ("The sky is", " blue")
    assert joined("The sky is ", "blue") == ("The sky is", " blue")
    assert joined("Answer:\n", "blue") == ("Answer:", "\nblue")
    assert joined("The sky is", " blue") == ("The sky is", " blue")
    assert joined("", "blue") == ("", "blue")


def test_tokens_divide_where_the_contexts_own_tokens_end(tokenizer: Tokenizer) -> None:
    before, after = encode_pair(tokenizer, "The quick brown", "fox jumps")
    assert before == tokenizer.encode("The quick brown")
    assert before + after == tokenizer.encode("The quick brown fox jumps")
    assert tokenizer.decode(after) == " fox jumps"


def test_an_empty_context_is_the_end_token(tokenizer: Tokenizer) -> None:
    assert encode_pair(tokenizer, "", "blue") == ([tokenizer.eos_id], tokenizer.encode("blue"))


def test_a_context_longer_than_the_model_loses_its_beginning_and_is_counted(twins, tokenizer: Tokenizer) -> None:
    context = "The lazy dog sleeps on; " * 30 + "the answer is"
    got = answer_questions(twins.ours, tokenizer, [Question(context, ("blue", "red"), 0)])
    assert got.truncated == 2
    whole = tokenizer.encode(context + " blue")
    after = len(whole) - len(tokenizer.encode(context))
    kept = torch.tensor([whole[-65:]])
    with torch.no_grad():
        logprobs = twins.theirs(kept[:, :-1]).logits[0].log_softmax(-1)
    expected = sum(float(logprobs[i - 1, kept[0, i]]) for i in range(65 - after, 65))
    assert got.answers[0].logprobs[0] == pytest.approx(expected, abs=1e-3)


def test_a_choice_longer_than_the_model_is_an_error(twins, tokenizer: Tokenizer) -> None:
    with pytest.raises(QuestionError, match=r"question 0: .* 64 positions"):
        answer_questions(twins.ours, tokenizer, [Question("c", ("blue", "x" * 3000), 0)])


def test_of_equally_probable_choices_the_first_is_picked(twins, tokenizer: Tokenizer) -> None:
    got = answer_questions(twins.ours, tokenizer, [Question("The answer is", ("blue", "blue"), 1)])
    assert (got.acc, got.acc_norm, got.answers[0].picked) == (0.0, 0.0, 0)


def test_several_right_choices_share_the_probability_and_any_of_them_is_a_right_pick(
    twins, tokenizer: Tokenizer
) -> None:
    choices = ("blue", "red", "that there is no answer")
    one, two = (Question("The answer is", choices, 1, also) for also in ((), (2,)))
    got = answer_questions(twins.ours, tokenizer, [one, two])
    alone, both = (torch.tensor(answer.logprobs, dtype=torch.float64).softmax(0) for answer in got.answers)
    assert got.answers[0].share == pytest.approx(float(alone[1]))
    assert got.answers[1].share == pytest.approx(float(both[1] + both[2]))
    assert got.mc2 == pytest.approx(float(alone[1] + both[1] + both[2]) / 2)
    assert got.chance == pytest.approx(0.5)
    picked = got.answers[0].picked
    assert got.acc == ((picked == 1) + (picked in (1, 2))) / 2


def test_no_questions_are_an_error(twins, tokenizer: Tokenizer) -> None:
    with pytest.raises(QuestionError, match="no questions"):
        answer_questions(twins.ours, tokenizer, [])


def test_the_standard_error_is_that_of_a_sample_mean(twins: object) -> None:
    from resilin.evaluate.multiple_choice import ChoiceScore

    score = ChoiceScore(5, 0.4, 0, 0, 0, 0, 0, ())
    outcomes = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    assert score.standard_error(0.4) == pytest.approx(float(outcomes.std() / 5**0.5))


def test_a_model_in_training_mode_stays_so(twins, tokenizer: Tokenizer) -> None:
    model: Decoder = twins.ours
    model.train()
    try:
        answer_questions(model, tokenizer, [Question("c", ("blue", "red"), 0)])
        assert model.training
    finally:
        model.eval()
