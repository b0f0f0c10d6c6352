"""Answers that the live model samples, and the rows a policy learns from.

Shapes: R answers, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resilin.inference.decoding import Decoding
from resilin.inference.generate import check_prompts
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
        stopped: whether an end token came before the limit.
    """

    prompt: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


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
    numbers: Sequence[int] | None = None,
    batch_rows: int = 256,
) -> list[Answer]:
    """An answer to every prompt.

    An answer depends on its prompt, the model, the sampling's seed and its number, not on its neighbours.

    Args:
        model: a decoder, or a model with one as its `policy`; its mode is left as it was.
        prompts: token ids; equal prompts in one batch are read once.
        sampling: how tokens are drawn, and the seed.
        max_new_tokens: of an answer; fewer where the model has no more positions.
        end_ids: tokens that end an answer.
        numbers: by which each answer's draws are keyed; None: 0, 1, 2, ...
        batch_rows: answers that grow side by side (the cache of keys and values grows with them).
    """
    decoder = decoder_of(model)
    check_prompts(decoder, prompts)
    numbers = list(range(len(prompts))) if numbers is None else numbers
    answers = [Answer(prompt) for prompt in prompts]
    rooms = [min(max_new_tokens, decoder.settings.max_positions - len(prompt)) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    for start in range(0, len(order), batch_rows):
        rows = order[start : start + batch_rows]
        longest = max(len(prompts[row]) + rooms[row] for row in rows)
        decoding = Decoding(decoder, [prompts[row] for row in rows], sampling, longest, [numbers[row] for row in rows])
        while decoding.live:
            done = []
            for new in decoding.step():
                row = rows[new.row]
                answer = answers[row]
                answer.tokens.append(new.token)
                answer.logprobs.append(new.draw_logprob)
                answer.stopped = new.token in end_ids
                if answer.stopped or len(answer.tokens) == rooms[row]:
                    done.append(new.row)
            decoding.drop(done)
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
