"""What is asked of a teacher, and what comes back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from resilin.config.errors import UserError


class TeacherError(UserError):
    """A request, a setting or an answer that cannot be used; the text says what to do."""


Message = dict[str, str]


def message(role: str, content: str) -> Message:
    """One message of a conversation."""
    return {"role": role, "content": content}


@dataclass(frozen=True, slots=True)
class Request:
    """A conversation to be continued.

    Attributes:
        messages: role and content of each.
        model: the endpoint's name for the model.
        temperature: of sampling; 0 is greedy.
        top_p: nucleus.
        max_tokens: of one answer.
        n: how many answers.
        seed: asks the endpoint for the same answers again, where it can.
        logprobs: ask for the log-probability of each token.
        stop: texts that end an answer.
        tag: the caller's own name for the request; it is handed back, and decides nothing.
    """

    messages: tuple[Message, ...]
    model: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    n: int = 1
    seed: int | None = None
    logprobs: bool = False
    stop: tuple[str, ...] = ()
    tag: str = ""

    def __post_init__(self) -> None:
        if not self.messages or any(
            not isinstance(item.get("role"), str) or not isinstance(item.get("content"), str) for item in self.messages
        ):
            raise TeacherError(f"request {self.tag!r}: messages should be a list of role and content, at least one")
        if self.n < 1 or self.max_tokens < 1:
            raise TeacherError(
                f"request {self.tag!r}: n = {self.n} and max_tokens = {self.max_tokens} should be at least 1"
            )

    def key(self, sample: int) -> str:
        """SHA-256 of everything that decides the answer of that number: the name it is cached under."""
        asked = {
            "model": self.model,
            "messages": [{"role": item["role"], "content": item["content"]} for item in self.messages],
            "sampling": {
                "temperature": float(self.temperature),
                "top_p": float(self.top_p),
                "max_tokens": self.max_tokens,
                "seed": self.seed,
                "logprobs": self.logprobs,
                "stop": list(self.stop),
            },
            "sample": sample,
        }
        canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def prompt_tokens(self) -> int:
        """About how many tokens the messages have: a quarter of their bytes, and four for each message."""
        return sum(-(-len(item["content"].encode(errors="replace")) // 4) + 4 for item in self.messages)


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer.

    Attributes:
        text: what was said.
        finish_reason: "stop", "length", or what else the endpoint calls it.
        logprobs: of each token, where asked for.
        prompt_tokens: of the call that gave it, where it was the first of that call.
        completion_tokens: likewise.
    """

    text: str
    finish_reason: str = "stop"
    logprobs: tuple[float, ...] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        """As kept in a cache."""
        kept: dict[str, Any] = {"text": self.text, "finish_reason": self.finish_reason}
        if self.logprobs is not None:
            kept["logprobs"] = list(self.logprobs)
        if self.prompt_tokens or self.completion_tokens:
            kept["usage"] = [self.prompt_tokens, self.completion_tokens]
        return kept

    @staticmethod
    def from_json(kept: dict[str, Any]) -> Sample:
        """The reverse.

        Raises:
            KeyError: it is no sample.
            TypeError: likewise.
        """
        text, reason, logprobs = kept["text"], kept["finish_reason"], kept.get("logprobs")
        if not isinstance(text, str) or not isinstance(reason, str):
            raise TypeError("text and finish_reason should be texts")
        prompt, completion = kept.get("usage", (0, 0))
        return Sample(text, reason, None if logprobs is None else tuple(logprobs), int(prompt), int(completion))


@dataclass(frozen=True, slots=True)
class Reply:
    """What a teacher says to a request.

    Attributes:
        texts: n answers; none where `error` is set.
        finish_reasons: of each.
        logprobs: of each token of each answer, where asked for.
        prompt_tokens: that the endpoint counted.
        completion_tokens: likewise.
        cached: nothing was asked of the endpoint.
        error: why there is no answer; None where there is.
        tries: calls that were made.
        tag: the request's.
    """

    texts: tuple[str, ...] = ()
    finish_reasons: tuple[str, ...] = ()
    logprobs: tuple[tuple[float, ...] | None, ...] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False
    error: str | None = None
    tries: int = 0
    tag: str = ""

    @property
    def text(self) -> str:
        """The first answer.

        Raises:
            TeacherError: the request failed.
        """
        if self.error is not None:
            raise TeacherError(f"request {self.tag!r} has no answer: {self.error}")
        return self.texts[0]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a batch would cost.

    Attributes:
        requests: in the batch.
        calls: to the endpoint, if each gives all answers asked for.
        cached: answers that are in the cache.
        prompt_tokens: to be sent, about.
        completion_tokens: to come back at most.
    """

    requests: int = 0
    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    models: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return (
            f"{self.calls:,} calls for {self.requests:,} requests ({self.cached:,} answers are cached), about "
            f"{self.prompt_tokens:,} tokens to send and at most {self.completion_tokens:,} to come back"
        )
