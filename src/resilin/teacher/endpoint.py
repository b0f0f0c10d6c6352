"""An OpenAI-compatible chat endpoint, over plain HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import math
import os
import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from resilin.config import Settings, component
from resilin.config.errors import explain
from resilin.teacher.backend import BackendError
from resilin.teacher.chat import ChatTeacher
from resilin.teacher.request import Request, Sample, TeacherError

_AGAIN = {408, 409, 425, 429}
_EVERYTHING = {401, 403, 404, 405}
_LARGEST = 64 << 20


class TeacherSettings(Settings):
    """A teacher; a subclass says which."""

    def build(self) -> ChatTeacher:
        """The teacher these settings describe."""
        raise TypeError(f"{type(self).__name__} has no build() method; a teacher's settings must define it")

    def model_name(self) -> str:
        """What requests call the model."""
        return ""


class EndpointTeacher(TeacherSettings):
    """A model behind an OpenAI-compatible endpoint (a hosted service, vLLM, llama.cpp, ...)."""

    base_url: str
    """Such as https://api.openai.com/v1 or http://localhost:8000/v1: /chat/completions is added."""
    model: str
    """The endpoint's name for the model."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the bearer key; unset sends none. The key is never written anywhere."""
    max_concurrency: Annotated[int, Field(ge=1)] = 8
    """Calls at a time."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Calls that begin within any minute."""
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Tokens sent and asked for within any minute, as estimated."""
    seconds: Annotated[float, Field(gt=0)] = 300.0
    """For one call."""
    tries: Annotated[int, Field(ge=1, le=8)] = 8
    """Calls for one request before it is given up."""
    first_wait: Annotated[float, Field(ge=0)] = 1.0
    """Seconds after the first failure; twice as many after each further one."""
    longest_wait: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between two tries at most, also where the endpoint asks for more."""
    cache: Path = Path(".cache/resilin/replies.jsonl")
    """Where answers are kept, and from where a run goes on."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request's body, such as {"reasoning_effort": "low"}; the cache's file is named by them."""

    def build(self) -> ChatTeacher:
        """The teacher."""
        backend = Endpoint(self.base_url, key_variable=self.key_variable, seconds=self.seconds, extra=self.extra)
        cache = self.cache
        if self.extra:
            name = hashlib.sha256(json.dumps(self.extra, sort_keys=True).encode()).hexdigest()[:8]
            cache = cache.with_stem(f"{cache.stem}-{name}")
        return ChatTeacher(
            backend,
            cache=cache,
            max_concurrency=self.max_concurrency,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            tries=self.tries,
            first_wait=self.first_wait,
            longest_wait=self.longest_wait,
        )

    def model_name(self) -> str:
        """The endpoint's name for the model."""
        return self.model


def read_teacher(path: Path) -> TeacherSettings:
    """The teacher a .toml or .json file describes; `use` names another class than `EndpointTeacher`.

    Raises:
        TeacherError: the file cannot be read.
        SettingsError: naming every key that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise TeacherError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise TeacherError(f"{path}: should be TOML, or JSON in a file that ends in .json: {error}") from None
    try:
        return _Holder.model_validate({"teacher": tree}).teacher
    except ValidationError as error:
        raise explain(error, {"teacher": tree}, str(path)) from None


class _Holder(Settings):
    teacher: Annotated[TeacherSettings, component("resilin.teacher.endpoint:EndpointTeacher")]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection would carry the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Endpoint:
    """Sends requests to {base_url}/chat/completions.

    Args:
        base_url: http or https.
        key_variable: environment variable of the bearer key.
        seconds: for one call, from its beginning to the last byte.
        extra: further fields of each body.

    Raises:
        TeacherError: the address is none.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        seconds: float = 300.0,
        extra: dict[str, Any] | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise TeacherError(
                f"base_url should look like https://host/v1, without user name or query, not {parts.scheme}://..."
            )
        self.url = base_url.rstrip("/") + "/chat/completions"
        self._key = os.environ.get(key_variable, "").strip()
        if self._key and not self._key.isprintable():
            raise TeacherError(f"the key in {key_variable} holds characters that no key has")
        self._seconds = seconds
        self._extra = dict(extra or {})
        self._opener = urllib.request.build_opener(_NoRedirect())
        self._pool = ThreadPoolExecutor(256, thread_name_prefix="teacher")  # grows only as far as it is used

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    async def send(self, request: Request, samples: Sequence[int]) -> list[Sample]:
        """One call for all these samples; an endpoint may give fewer."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._call, request, list(samples))

    def body(self, request: Request, samples: Sequence[int]) -> dict[str, Any]:
        """The JSON object that is sent."""
        body: dict[str, Any] = {
            "model": request.model,
            "messages": [{"role": item["role"], "content": item["content"]} for item in request.messages],
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_tokens": request.max_tokens,
            "n": len(samples),
        }
        if request.seed is not None:
            # The samples that are still missing should not repeat the first ones.
            body["seed"] = request.seed + samples[0]
        if request.logprobs:
            body["logprobs"] = True
        if request.stop:
            body["stop"] = list(request.stop)
        return {**body, **self._extra}

    def _call(self, request: Request, samples: list[int]) -> list[Sample]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "resilin"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = json.dumps(self.body(request, samples)).encode()
        call = urllib.request.Request(self.url, data=data, headers=headers, method="POST")
        ends = time.monotonic() + self._seconds
        try:
            with self._opener.open(call, timeout=self._seconds) as response:
                raw = self._read(response, ends)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except TimeoutError:
            raise BackendError(f"no answer within {self._seconds:g} s", again=True) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise BackendError(f"no answer within {self._seconds:g} s", again=True) from None
            raise BackendError(self._clean(f"the connection failed: {reason!r}"), again=True) from None
        return self._samples(raw, request, len(samples))

    def _read(self, response: Any, ends: float) -> bytes:
        """The whole body, within the time: a server that sends a byte now and then holds nobody up for ever."""
        parts, size = [], 0
        while block := response.read1(1 << 16):
            parts.append(block)
            size += len(block)
            if size > _LARGEST:
                raise BackendError(f"an answer of more than {_LARGEST >> 20} MiB", again=False)
            if time.monotonic() > ends:
                raise TimeoutError
        if response.length:  # fewer bytes came than were announced
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(parts)

    def _clean(self, text: str) -> str:
        """A message without the key, in one short line."""
        if self._key:
            text = text.replace(self._key, "(the key)")
        return " ".join(text.split())[:300]

    def _refused(self, error: urllib.error.HTTPError) -> BackendError:
        try:
            said = error.read(2000).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            said = ""
        after = None
        with contextlib.suppress(ValueError):  # a date, or nothing: the usual waits do
            after = float(error.headers.get("Retry-After", ""))
        if after is not None and not (math.isfinite(after) and after >= 0):
            after = None
        status = error.code
        hint = {401: ": is the key right?", 403: ": is the key right?", 404: ": are base_url and model right?"}
        what = self._clean(f"status {status}{hint.get(status, '')} {said}".rstrip())
        again = status in _AGAIN or status >= 500
        return BackendError(what, again=again, after=after, everything=status in _EVERYTHING)

    def _samples(self, raw: bytes, request: Request, asked: int) -> list[Sample]:
        """The answers in a body; what is no answer may be one the next time."""
        try:
            value = json.loads(raw)
            choices = value["choices"]
            if not isinstance(choices, list) or not choices:
                raise TypeError("choices should be a list of at least one")
            samples = [self._sample(choice, request) for choice in choices[:asked]]
            usage = value.get("usage") or {}
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            shown = self._clean(raw[:120].decode(errors="replace"))
            raise BackendError(
                f"the endpoint answered what is no chat completion ({type(error).__name__}): {shown!r}", again=True
            ) from None
        prompt, completion = (count if isinstance(count, int) else 0 for count in counts)
        first = samples[0]
        samples[0] = Sample(first.text, first.finish_reason, first.logprobs, prompt, completion)
        return samples

    def _sample(self, choice: Any, request: Request) -> Sample:
        reason = choice.get("finish_reason") or "stop"
        text = choice["message"]["content"]
        if text is None and reason == "content_filter":
            text = ""
        if not isinstance(text, str) or not isinstance(reason, str):
            raise TypeError("content should be a text")
        logprobs = None
        if request.logprobs:
            logprobs = tuple(float(token["logprob"]) for token in choice["logprobs"]["content"])
        return Sample(text, reason, logprobs)
