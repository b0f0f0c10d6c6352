"""Continue prompts with a model, many at a time: tokens, their log-probabilities, and text as it appears.

Greedy or sampled, a row's answer does not depend on the rows it is batched with: padding is never attended to, draws
are keyed by the row's number. Rows that are done leave the batch, and others that wait take their places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from resilin.config.errors import UserError
from resilin.data.tokenizer import Tokenizer
from resilin.inference.decoding import Decoding
from resilin.inference.sampling import Sampling
from resilin.inference.stop import StopStrings
from resilin.models.decoder import Decoder

Reason = Literal["stop_token", "stop_string", "max_new_tokens", "max_positions"]


class PromptError(UserError):
    """A prompt that the model cannot continue; the text says which one and why."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One new token of one row.

    Attributes:
        row: index of the prompt it continues.
        token: its id.
        logprob: under the model, at temperature 1 and without filters.
        draw_logprob: under the distribution it was drawn from; 0 when greedy.
        text: what became certain with it: whole characters, nothing of a stop string; often "".
        reason: why the row ends with this token; None while it goes on.
        found: the stop string that ended it.
    """

    row: int
    token: int
    logprob: float
    draw_logprob: float
    text: str
    reason: Reason | None
    found: str | None = None


@dataclass(slots=True)
class Continuation:
    """What a model wrote after a prompt.

    Attributes:
        tokens: all new ids, a stop token and the tokens of a stop string included.
        logprobs: of each under the model, at temperature 1 and without filters.
        draw_logprobs: of each under the distribution it was drawn from.
        text: decoded without special tokens, and cut before the stop string; "" without a tokenizer.
        reason: why it ended.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    draw_logprobs: list[float] = field(default_factory=list)
    text: str = ""
    reason: Reason = "max_new_tokens"


@dataclass(frozen=True, slots=True)
class StopRule:
    """When an answer ends.

    Attributes:
        max_new_tokens: at most so many tokens; >= 1.
        ids: tokens that end it; usually the tokenizer's `eos_id`.
        strings: texts that end it and are cut off, wherever the borders between tokens fall.
    """

    max_new_tokens: int = 128
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: expected 1 or more")


class _Row:
    """The text of one row, and whether it is done."""

    def __init__(self, tokenizer: Tokenizer | None, stop: StopRule, limit: int) -> None:
        self._decoder = tokenizer.stream_decoder() if tokenizer is not None else None
        self._strings = StopStrings(stop.strings)
        self._ids = stop.ids
        self._left = min(stop.max_new_tokens, limit)
        self._at_end: Reason = "max_new_tokens" if stop.max_new_tokens <= limit else "max_positions"

    @property
    def found(self) -> str | None:
        """The stop string that ended the row."""
        return self._strings.found

    def push(self, token: int) -> tuple[str, Reason | None]:
        """The text that is certain with this token, and why the row ends here, if it does."""
        self._left -= 1
        is_stop = token in self._ids
        text = ""
        if self._decoder is not None and not is_stop:
            text = self._strings.push(self._decoder.step(token))
        at_end = is_stop or self._left == 0
        if self._decoder is not None and at_end:
            text += self._strings.push(self._decoder.finish()) + self._strings.flush()
        if self._strings.found is not None:
            return text, "stop_string"
        return text, "stop_token" if is_stop else self._at_end if at_end else None


def check_prompts(model: Decoder, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that are empty, too long, or hold ids the model does not have.

    Raises:
        PromptError: naming the prompt.
    """
    most, vocabulary = model.settings.max_positions, model.settings.vocab_size
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise PromptError(f"prompt {number} is empty: give at least one token (a text, or the begin token)")
        if len(prompt) >= most:
            raise PromptError(
                f"prompt {number} has {len(prompt)} tokens; the model takes {most} positions, prompt and answer "
                f"together: shorten the prompt to at most {most - 1} tokens"
            )
        wrong = next((token for token in prompt if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise PromptError(
                f"prompt {number} holds token id {wrong}; the model knows 0 to {vocabulary - 1}: was it made with "
                "another tokenizer?"
            )


def with_special_stops(stop: StopRule, tokenizer: Tokenizer) -> StopRule:
    """`stop` where a stop string that names a special token (<|im_end|>) also ends the answer by its id.

    The text itself never shows special tokens, so the string alone would never be found.
    """
    named = tokenizer.special_ids & {tokenizer.inner.token_to_id(text) for text in stop.strings}
    return StopRule(stop.max_new_tokens, stop.ids | named, stop.strings)


def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    stop: StopRule,
    *,
    sampling: Sampling | None = None,
    tokenizer: Tokenizer | None = None,
    rows: Sequence[int] | None = None,
    batch_rows: int | None = None,
    begun: Sequence[int] | None = None,
) -> Iterator[Piece]:
    """Continue prompts side by side; yields every new token as soon as it is there.

    Args:
        model: on any device; its mode is left as it was.
        prompts: token ids of each prompt; equal prompts are read once.
        stop: when an answer ends.
        sampling: how tokens are chosen; None: greedy.
        tokenizer: gives the text; needed for stop strings.
        rows: the numbers by which the prompts' draws are keyed; None: their indices.
        batch_rows: at most so many at a time, the others as places become free (the cache of keys and values grows
            with them); None: all.
        begun: how many of each prompt's last tokens are the beginning of its answer: they count for the limit and for
            stop strings, and are not given again. Prompts then begin in the order they are given.

    Raises:
        PromptError: a prompt cannot be continued.
        ValueError: stop strings without a tokenizer.
    """
    check_prompts(model, prompts)
    if tokenizer is not None:
        stop = with_special_stops(stop, tokenizer)
    elif stop.strings:
        raise ValueError("stop strings need a tokenizer: give one, or stop by token ids")
    sampling = sampling if sampling is not None else Sampling(temperature=0.0)
    if rows is not None and len(rows) != len(prompts):
        raise ValueError(f"{len(rows)} row numbers were given for {len(prompts)} prompts")
    before = [0] * len(prompts) if begun is None else list(begun)
    room = [model.settings.max_positions - len(p) + b for p, b in zip(prompts, before, strict=True)]
    states = [_Row(tokenizer, stop, limit) for limit in room]
    for state, prompt, count in zip(states, prompts, before, strict=True):
        for token in prompt[len(prompt) - count :]:
            state.push(token)
    most = [min(stop.max_new_tokens, r) for r in room]
    longest = max((len(p) - b + m for p, b, m in zip(prompts, before, most, strict=True)), default=0)
    decoding = Decoding(model, prompts, sampling, longest, rows, batch_rows, begun is not None)
    while decoding.going:
        done = []
        for new in decoding.step():
            state = states[new.row]
            text, reason = state.push(new.token)
            if reason is not None:
                done.append(new.row)
            yield Piece(new.row, new.token, new.logprob, new.draw_logprob, text, reason, state.found)
        decoding.drop(done)


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    stop: StopRule,
    *,
    sampling: Sampling | None = None,
    tokenizer: Tokenizer | None = None,
    rows: Sequence[int] | None = None,
    batch_rows: int = 64,
) -> list[Continuation]:
    """Continue every prompt to its end.

    Args:
        model: as for `stream`.
        prompts: as for `stream`.
        stop: as for `stream`.
        sampling: as for `stream`.
        tokenizer: as for `stream`.
        rows: as for `stream`.
        batch_rows: as for `stream`.

    Returns:
        one `Continuation` for each prompt, in order.
    """
    results = [Continuation() for _ in prompts]
    pieces = stream(model, prompts, stop, sampling=sampling, tokenizer=tokenizer, rows=rows, batch_rows=batch_rows)
    for piece in pieces:
        result = results[piece.row]
        result.tokens.append(piece.token)
        result.logprobs.append(piece.logprob)
        result.draw_logprobs.append(piece.draw_logprob)
        result.text += piece.text
        if piece.reason is not None:
            result.reason = piece.reason
    return results
