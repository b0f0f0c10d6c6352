"""Answers that the live model samples, and the rows a policy learns from.

Shapes: R answers, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resilin.data.tokenizer import Tokenizer
from resilin.inference.generate import StopRule, stream
from resilin.inference.sampling import Sampling
from resilin.models.decoder import Decoder
from resilin.objective.next_token import IGNORE


@dataclass(slots=True)
class Answer:
    """What was sampled after one prompt.

    Attributes:
        prompt: its tokens.
        tokens: the new ones, the end token included where it came.
        logprobs: of each, under the distribution it was drawn from.
        stopped: whether an end token or a stop string came before the limit.
        stop: the stop string that ended it; its last token may say more, which `said` cuts off.
    """

    prompt: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    stop: str | None = None

    def said(self, text: str) -> str:
        """The answer's text, given that of its tokens: up to the stop string and with it."""
        end = -1 if self.stop is None else text.find(self.stop)
        return text if end < 0 else text[: end + len(self.stop or "")]


def decoder_of(model: Any) -> Decoder:
    """The part of a model that writes text: itself, or its `policy`.

    Raises:
        TypeError: neither is a decoder.
    """
    found = getattr(model, "policy", model)
    found = getattr(found, "_orig_mod", found)  # of a compiled model the original: decoding has shapes of its own
    if not isinstance(found, Decoder):
        raise TypeError(f"answers are sampled from a Decoder; the run's model is a {type(model).__name__}")
    return found


def sample_answers(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    end_ids: frozenset[int],
    *,
    stop: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    numbers: Sequence[int] | None = None,
    batch_rows: int = 256,
) -> list[Answer]:
    """An answer to every prompt.

    An answer depends on its prompt, the model, the sampling's seed and its number, not on its neighbours.

    Args:
        model: a decoder, or a model with one as its `policy`; its mode is left as it was.
        prompts: token ids; equal prompts are read once.
        sampling: how tokens are drawn, and the seed.
        max_new_tokens: of an answer; fewer where the model has no more positions.
        end_ids: tokens that end an answer.
        stop: texts that end an answer, wherever the borders between tokens fall.
        tokenizer: needed for those.
        numbers: by which each answer's draws are keyed; None: 0, 1, 2, ...
        batch_rows: answers that grow side by side (the cache of keys and values grows with them); the others take the
            places of those that are done.
    """
    answers = [Answer(prompt) for prompt in prompts]
    rule = StopRule(max_new_tokens, end_ids, tuple(stop))
    words = tokenizer if stop else None  # without stop strings nobody needs the text as it grows
    pieces = stream(
        decoder_of(model), prompts, rule, sampling=sampling, tokenizer=words, rows=numbers, batch_rows=batch_rows
    )
    for piece in pieces:
        answer = answers[piece.row]
        answer.tokens.append(piece.token)
        answer.logprobs.append(piece.draw_logprob)
        if piece.reason is not None:
            answer.stopped, answer.stop = piece.reason in ("stop_token", "stop_string"), piece.found
    return answers


def rows_of(answers: Sequence[Answer]) -> dict[str, Tensor]:
    """The answers as rows: `tokens`, `labels` and `old_logprobs`, each (R, T), right-padded.

    `labels[r, t]` is what followed `tokens[r, t]`, and -100 where the prompt or padding follows.
    """
    width = max(len(answer.prompt) + len(answer.tokens) for answer in answers) - 1
    tokens_RT = torch.zeros(len(answers), width, dtype=torch.int64)
    labels_RT = torch.full((len(answers), width), IGNORE)
    logprobs_RT = torch.zeros(len(answers), width)
    for row, answer in enumerate(answers):
        text = [*answer.prompt, *answer.tokens]
        first, last = len(answer.prompt) - 1, len(text) - 1
        tokens_RT[row, :last] = torch.tensor(text[:-1])
        labels_RT[row, first:last] = torch.tensor(answer.tokens)
        logprobs_RT[row, first:last] = torch.tensor(answer.logprobs)
    return {"tokens": tokens_RT, "labels": labels_RT, "old_logprobs": logprobs_RT}
