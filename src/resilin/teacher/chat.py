"""Many requests to a teacher: cached, in order, with limits and second tries, and never lost.

An answer is written to the cache before it is used, so a run that dies goes on where it was: what is there is not
asked again. A request that fails for good becomes a reply with `error` and a line in the file of failures; it is no
exception, and the rest of the batch goes on.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from resilin.teacher.backend import Backend, BackendError, Script, Scripted, Silent
from resilin.teacher.cache import ReplyCache
from resilin.teacher.limits import Clock, PerMinute, Sleep, wait_before
from resilin.teacher.request import Plan, Reply, Request, Sample, TeacherError


class ChatTeacher:
    """Answers requests through a back-end.

    Args:
        backend: what answers.
        cache: where answers are kept; None keeps them only for the time of a call.
        failures: a .jsonl file to which failed requests are appended; None: beside the cache.
        max_concurrency: calls at a time.
        requests_per_minute: calls that begin within any minute; None: as many as there are.
        tokens_per_minute: tokens sent and asked for within any minute, as estimated.
        tries: calls for one request before it is given up.
        first_wait: seconds after the first failure; doubles with each further one.
        longest_wait: seconds between tries at most.
        sleep: waits; replaced in tests.
        clock: tells seconds; replaced in tests.

    Attributes:
        watch: told of each reply as it comes, by every call; for progress.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        cache: ReplyCache | Path | None = None,
        failures: Path | None = None,
        max_concurrency: int = 8,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        tries: int = 8,
        first_wait: float = 1.0,
        longest_wait: float = 60.0,
        sleep: Sleep = asyncio.sleep,
        clock: Clock = time.monotonic,
    ) -> None:
        if min(max_concurrency, tries) < 1:
            raise TeacherError("max_concurrency and tries should be at least 1")
        self.backend = backend
        self.cache = ReplyCache(cache) if isinstance(cache, Path) else cache
        beside = self.cache.path.with_suffix(".failures.jsonl") if self.cache is not None else None
        self.failures = failures or beside
        self.max_concurrency = max_concurrency
        self.tries = tries
        self._rates = (requests_per_minute, tokens_per_minute)
        self._waits = (first_wait, longest_wait)
        self._sleep, self._clock = sleep, clock
        self.watch: Callable[[Reply], None] | None = None

    def plan(self, batch: Sequence[Request]) -> Plan:
        """What `complete` would ask and cost, without asking anything."""
        calls = cached = prompt = completion = 0
        seen: dict[str, int] = {}
        for request in batch:
            name = request.key(-1)
            known = seen.get(name, 0)
            missing = [n for n in range(request.n) if n >= known and not self._has(request, n)]
            cached += request.n - len(missing)
            seen[name] = max(known, request.n)
            if missing:
                calls += 1
                prompt += request.prompt_tokens
                completion += request.max_tokens * len(missing)
        models = tuple(sorted({request.model for request in batch}))
        return Plan(len(batch), calls, cached, prompt, completion, models)

    def _has(self, request: Request, sample: int) -> bool:
        return self.cache is not None and request.key(sample) in self.cache

    def known(self, request: Request) -> Reply | None:
        """The reply that the cache holds; None where an answer of it is missing."""
        if self.cache is None:
            return None
        kept = [self.cache.get(request.key(number)) for number in range(request.n)]
        samples = [sample for sample in kept if sample is not None]
        return _cut(request, samples, Reply(cached=True)) if len(samples) == request.n else None

    async def complete(self, batch: Sequence[Request], *, done: Callable[[Reply], None] | None = None) -> list[Reply]:
        """A reply to each request, in their order.

        Args:
            batch: equal requests are asked once.
            done: told of each request as it ends, in no order.
        """
        most: dict[str, Request] = {}
        for request in batch:
            name = request.key(-1)
            if name not in most or most[name].n < request.n:
                most[name] = request
        work = iter(most.items())
        found: dict[str, tuple[list[Sample], Reply]] = {}
        rates = [PerMinute(rate, clock=self._clock, sleep=self._sleep) for rate in self._rates]
        stopped: list[str] = []

        async def worker() -> None:
            for name, request in work:
                found[name] = await self._one(request, rates, stopped)
                for told in (done, self.watch):
                    if told is not None:
                        told(found[name][1])

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.max_concurrency, len(most))):
                group.create_task(worker())
        return [_cut(request, *found[request.key(-1)]) for request in batch]

    def ask(self, batch: Sequence[Request], *, done: Callable[[Reply], None] | None = None) -> list[Reply]:
        """`complete` for code that does not wait by itself; also inside a running event loop."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return _unwrapped(lambda: asyncio.run(self.complete(batch, done=done)))
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.ask, batch, done=done).result()

    async def _one(
        self, request: Request, rates: Sequence[PerMinute], stopped: list[str]
    ) -> tuple[list[Sample], Reply]:
        kept = {n: self.cache.get(request.key(n)) for n in range(request.n)} if self.cache is not None else {}
        have = {n: sample for n, sample in kept.items() if sample is not None}
        tries = failed = prompt = completion = 0
        error: str | None = None
        while len(have) < request.n:
            missing = [n for n in range(request.n) if n not in have]
            if stopped:
                error = stopped[0]
                break
            await rates[0].take()
            await rates[1].take(request.prompt_tokens + request.max_tokens * len(missing))
            tries += 1
            try:
                said = await self.backend.send(request, missing)
                if not said:
                    raise BackendError("an answer without a single text", again=True)
            except BackendError as problem:
                failed += 1
                if problem.everything:
                    stopped.append(str(problem))
                if not problem.again or problem.everything or failed >= self.tries:
                    error = f"{problem} (tried {failed} {'time' if failed == 1 else 'times'})"
                    break
                await self._sleep(wait_before(failed, request.key(-1), *self._waits, problem.after))
                continue
            for n, sample in zip(missing, said, strict=False):
                prompt += sample.prompt_tokens
                completion += sample.completion_tokens
                about = {"tag": request.tag} if request.tag else None
                have[n] = sample if self.cache is None else self.cache.put(request.key(n), sample, about)
        if error is not None:
            self._record(request, error)
            return [], Reply(error=error, tries=tries, tag=request.tag)
        samples = [have[n] for n in range(request.n)]
        return samples, Reply(prompt_tokens=prompt, completion_tokens=completion, cached=tries == 0, tries=tries)

    def _record(self, request: Request, error: str) -> None:
        if self.failures is None:
            return
        self.failures.parent.mkdir(parents=True, exist_ok=True)
        row = {"key": request.key(-1), "tag": request.tag, "error": error, "messages": list(request.messages)}
        with self.failures.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=True) + "\n")


def _cut(request: Request, samples: list[Sample], reply: Reply) -> Reply:
    """The reply for a request that was asked together with equal ones."""
    mine = samples[: request.n]
    return Reply(
        texts=tuple(sample.text for sample in mine),
        finish_reasons=tuple(sample.finish_reason for sample in mine),
        logprobs=tuple(sample.logprobs for sample in mine) if request.logprobs and mine else None,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        cached=reply.cached,
        error=reply.error,
        tries=reply.tries,
        tag=request.tag,
    )


def _unwrapped(run: Callable[[], list[Reply]]) -> list[Reply]:
    """Run; of a group of errors raise the first one itself."""
    try:
        return run()
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


class ScriptedTeacher(ChatTeacher):
    """A teacher whose answers are a function or a table (see `resilin.teacher.backend.Script`)."""

    def __init__(self, script: Script, *, cache: ReplyCache | Path | None = None) -> None:
        super().__init__(Scripted(script), cache=cache, tries=1)


class CassetteTeacher(ChatTeacher):
    """A teacher that knows only what a cache file recorded.

    Args:
        path: the file.
        strict: a request that is not there raises `UnknownRequestError`; otherwise its reply has an error.
    """

    def __init__(self, path: Path, *, strict: bool = True) -> None:
        if not path.is_file():
            raise TeacherError(f"{path}: no such recording")
        super().__init__(Silent(str(path), strict), cache=path, failures=path.with_suffix(".failures.jsonl"), tries=1)
