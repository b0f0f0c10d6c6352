"""Multiple-choice accuracy by log-likelihood: the model's answer is the choice it finds most probable.

The convention of the usual evaluation harness: context and choice are joined by one space, which belongs to the
choice; both are tokenised together and divided where the context's own tokens end; the tokens of the choice are
scored given those of the context. `acc` takes the largest sum of log-probabilities, `acc_norm` the largest sum per
character of the choice, `acc_bytes` per byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resilin.data.tokenizer import Tokenizer
from resilin.evaluate.questions import Question, QuestionError
from resilin.inference.scoring import Passage, score
from resilin.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model makes of one question.

    Attributes:
        logprobs: of each choice, summed over its tokens; nats.
        picked: index of the choice with the largest sum (the first of equals).
        picked_norm: with the largest sum per character.
        picked_bytes: with the largest sum per byte.
        share: of the probability of all choices, what the right ones have; in [0, 1].
    """

    logprobs: tuple[float, ...]
    picked: int
    picked_norm: int
    picked_bytes: int
    share: float


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """Accuracies over a set of questions, in [0, 1].

    Attributes:
        questions: how many.
        acc: share of right answers by the sum of log-probabilities.
        acc_norm: by the sum per character of the choice.
        acc_bytes: by the sum per byte.
        mc2: mean share of the probability that the right choices have (TruthfulQA, Lin et al. 2022, section 3).
        chance: expected share of a blind guess.
        truncated: choices whose context was cut at its beginning to fit the model's positions.
        answers: of each question, in order.
    """

    questions: int
    acc: float
    acc_norm: float
    acc_bytes: float
    mc2: float
    chance: float
    truncated: int
    answers: tuple[Answer, ...]

    def standard_error(self, accuracy: float) -> float:
        """Of an accuracy over these questions, taken as a sample; NaN for a single question."""
        return math.sqrt(accuracy * (1 - accuracy) / (self.questions - 1)) if self.questions > 1 else math.nan


def joined(context: str, choice: str) -> tuple[str, str]:
    """Context and continuation as they are tokenised: white space between them belongs to the continuation.

    One space is put between them, unless either brings its own; an empty context takes none.
    """
    bare = context.rstrip()
    space = context[len(bare) :]
    if context and not space and not choice[:1].isspace():
        space = " "
    return bare, space + choice


def encode_pair(tokenizer: Tokenizer, context: str, choice: str) -> tuple[list[int], list[int]]:
    """Tokens of the context and of the choice after it, divided where the context's own tokens end.

    Raises:
        QuestionError: the context is empty and the tokenizer has neither a begin nor an end token to stand before the
            choice.
    """
    context, continuation = joined(context, choice)
    if not context:
        prefix = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if prefix is None:
            raise QuestionError(
                "a question without context needs a token to stand before its choices, and the tokenizer has neither "
                "a begin nor an end token: give every question a context"
            )
        return [prefix], tokenizer.encode(continuation)
    before = tokenizer.encode(context)
    whole = tokenizer.encode(context + continuation)
    if len(whole) <= len(before):  # the choice melted into the context's last token
        return before, tokenizer.encode(continuation)
    return whole[: len(before)], whole[len(before) :]


Encode = Callable[[Question, str], tuple[list[int], list[int]]]
"""Tokens before a choice of a question, and of the choice."""


def _share(logprobs: Sequence[float], golds: Sequence[int]) -> float:
    most = max(logprobs)
    parts = [math.exp(value - most) for value in logprobs]
    return math.fsum(parts[index] for index in golds) / math.fsum(parts)  # exact sums: never a hair above 1


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: (values[index], -index))


def answer_questions(
    model: Decoder,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    begin_token: bool = False,
    encode: Encode | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[float], None] | None = None,
) -> ChoiceScore:
    """Score every choice of every question.

    Args:
        model: whose mode is left as it was.
        tokenizer: of the model.
        questions: at least one.
        begin_token: put the tokenizer's begin token (where it has one) before every context.
        encode: how context and choice become tokens; None: `encode_pair`.
        batch_tokens: positions in a batch, padding counted.
        progress: called with the share done.

    Raises:
        QuestionError: no questions, or a choice that alone is longer than the model's positions.
    """
    if not questions:
        raise QuestionError("there are no questions to answer")
    most = model.settings.max_positions + 1  # the last token is foretold, not read
    passages: list[Passage] = []
    truncated = 0
    begin = [tokenizer.bos_id] if begin_token and tokenizer.bos_id is not None else []
    for number, question in enumerate(questions):
        for choice in question.choices:
            if encode is None:
                before, after = encode_pair(tokenizer, question.context, choice)
            else:
                before, after = encode(question, choice)
            before = begin + before if before != begin else before
            if len(after) >= most:
                raise QuestionError(
                    f"question {number}: a choice has {len(after)} tokens; the model takes {most - 1} positions"
                )
            truncated += len(before) + len(after) > most
            before = before[-(most - len(after)) :]
            passages.append(Passage(before + after, len(before)))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done / len(passages))

    sums = [float(lp.double().sum()) for lp, _ in score(model, passages, batch_tokens=batch_tokens, progress=advance)]
    answers = []
    for question in questions:
        own, sums = sums[: len(question.choices)], sums[len(question.choices) :]
        by_character = [value / len(choice) for value, choice in zip(own, question.choices, strict=True)]
        by_byte = [value / len(choice.encode()) for value, choice in zip(own, question.choices, strict=True)]
        share = _share(own, question.golds)
        answers.append(Answer(tuple(own), _argmax(own), _argmax(by_character), _argmax(by_byte), share))
    count, golds = len(questions), [question.golds for question in questions]
    return ChoiceScore(
        questions=count,
        acc=sum(a.picked in gold for a, gold in zip(answers, golds, strict=True)) / count,
        acc_norm=sum(a.picked_norm in gold for a, gold in zip(answers, golds, strict=True)) / count,
        acc_bytes=sum(a.picked_bytes in gold for a, gold in zip(answers, golds, strict=True)) / count,
        mc2=sum(answer.share for answer in answers) / count,
        chance=sum(len(question.golds) / len(question.choices) for question in questions) / count,
        truncated=truncated,
        answers=tuple(answers),
    )
