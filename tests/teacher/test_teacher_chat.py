"""Caching, resuming, limits and stand-ins of the teacher."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from resilin.teacher import ChatTeacher, Request, message
from resilin.teacher.backend import BackendError, UnknownRequestError
from resilin.teacher.cache import ReplyCache
from resilin.teacher.chat import CassetteTeacher, ScriptedTeacher
from resilin.teacher.limits import PerMinute, wait_before
from resilin.teacher.request import Sample, TeacherError


def ask(text: str, **kw: Any) -> Request:
    return Request((message("user", text),), model="m", **kw)


class Counting:
    """Says the last message and the sample's number; dies when it is asked for the time `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.calls: list[tuple[str, list[int]]] = []
        self.dies_at = dies_at

    async def send(self, request: Request, samples: Sequence[int]) -> list[Sample]:
        if self.dies_at is not None and len(self.calls) >= self.dies_at:
            raise KeyboardInterrupt
        self.calls.append((request.messages[-1]["content"], list(samples)))
        await asyncio.sleep(0)
        return [Sample(f"{request.messages[-1]['content']}/{sample}") for sample in samples]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    batch = [ask(f"q{n}", n=2) for n in range(10)]
    with pytest.raises(KeyboardInterrupt):
        ChatTeacher(Counting(dies_at=4), cache=tmp_path / "c.jsonl", max_concurrency=1).ask(batch)
    second = Counting()
    replies = ChatTeacher(second, cache=tmp_path / "c.jsonl", max_concurrency=1).ask(batch)
    assert [reply.texts for reply in replies] == [(f"q{n}/0", f"q{n}/1") for n in range(10)]
    assert [text for text, _ in second.calls] == [f"q{n}" for n in range(4, 10)]
    assert [reply.cached for reply in replies] == [n < 4 for n in range(10)]
    third = Counting()
    assert [r.texts for r in ChatTeacher(third, cache=tmp_path / "c.jsonl").ask(batch)] == [r.texts for r in replies]
    assert third.calls == []


def test_an_answer_is_on_disk_before_it_is_used(tmp_path: Path) -> None:
    seen = []

    def look(reply: object) -> None:
        seen.append(len((tmp_path / "c.jsonl").read_text().splitlines()))

    ChatTeacher(Counting(), cache=tmp_path / "c.jsonl", max_concurrency=1).ask([ask("a"), ask("b")], done=look)
    assert seen == [1, 2]


def test_only_missing_samples_are_asked_for(tmp_path: Path) -> None:
    first = Counting()
    ChatTeacher(first, cache=tmp_path / "c.jsonl").ask([ask("a", n=2)])
    second = Counting()
    (reply,) = ChatTeacher(second, cache=tmp_path / "c.jsonl").ask([ask("a", n=5)])
    assert second.calls == [("a", [2, 3, 4])]
    assert reply.texts == tuple(f"a/{n}" for n in range(5))


def test_equal_requests_are_asked_once_and_tags_decide_nothing() -> None:
    backend = Counting()
    replies = ChatTeacher(backend).ask([ask("a", tag="1"), ask("b"), ask("a", tag="2", n=3), ask("a", tag="1")])
    assert sorted(backend.calls) == [("a", [0, 1, 2]), ("b", [0])]
    assert [reply.texts for reply in replies] == [("a/0",), ("b/0",), ("a/0", "a/1", "a/2"), ("a/0",)]
    assert [reply.tag for reply in replies] == ["1", "", "2", "1"]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "k"},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"max_tokens": 5},
        {"seed": 1},
        {"stop": ("x",)},
        {"logprobs": True},
    ],
)
def test_everything_that_decides_an_answer_is_in_its_key(change: dict[str, Any]) -> None:
    base: dict[str, Any] = {"messages": (message("user", "a"),), "model": "m"}
    assert Request(**{**base, **change}).key(0) != Request(**base).key(0)
    assert Request(**base, tag="t", n=4).key(0) == Request(**base).key(0)
    assert Request(**base).key(1) != Request(**base).key(0)
    assert Request(**{**base, "messages": (message("system", "a"),)}).key(0) != Request(**base).key(0)


def test_keys_stay_the_same_from_version_to_version() -> None:
    assert ask("a").key(0) == "ca5bfc65a1e3dfc0bb8a4be4ebf093860b9273ce2f9b025631ec70b4ac9c05d4"


@pytest.mark.parametrize(
    "ending", ['{"key": "torn', '{"key": "x", "text": 5, "finish_reason": "stop"}\n', "\x00\xff\n", "5\n"]
)
def test_a_torn_or_foreign_line_costs_only_itself(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "c.jsonl"
    cache = ReplyCache(path)
    cache.put("a", Sample("one", "length", (-0.5,), 3, 4))
    with path.open("ab") as stream:
        stream.write(ending.encode("latin-1"))
    again = ReplyCache(path)
    assert again.broken == 1
    again.put("b", Sample("two"))
    third = ReplyCache(path)
    assert third.get("a") == Sample("one", "length", (-0.5,), 3, 4)
    assert third.get("b") == Sample("two")
    assert third.put("b", Sample("other")) == Sample("two")
    with pytest.raises(TeacherError, match="is a folder"):
        ReplyCache(tmp_path)


def test_a_plan_counts_calls_and_tokens_without_asking(tmp_path: Path) -> None:
    backend = Counting()
    teacher = ChatTeacher(backend, cache=tmp_path / "c.jsonl")
    teacher.ask([ask("known")])
    backend.calls.clear()
    batch = [ask("known", max_tokens=1024), ask("x" * 40, n=2, max_tokens=10), ask("x" * 40, n=2, max_tokens=10)]
    plan = teacher.plan(batch)
    assert backend.calls == []
    assert (plan.requests, plan.calls, plan.cached) == (3, 1, 3)
    assert (plan.prompt_tokens, plan.completion_tokens) == (14, 20)
    assert str(plan).startswith("1 calls for 3 requests (3 answers are cached), about 14 tokens")


def test_scripts_answer_by_function_or_by_table() -> None:
    assert ScriptedTeacher(lambda request, n: f"{n}!").ask([ask("a", n=2)])[0].texts == ("0!", "1!")
    table = ScriptedTeacher({"a": "one", "b": ["x", "y"]})
    replies = table.ask([ask("a", n=2), ask("b", n=3), ask("c")])
    assert [reply.texts for reply in replies] == [("one", "one"), ("x", "y", "x"), ()]
    assert "the script has no answer to 'c'" in str(replies[2].error)


def test_a_recording_knows_only_what_it_recorded(tmp_path: Path) -> None:
    path = tmp_path / "tape.jsonl"
    ScriptedTeacher(lambda request, n: f"said {n}", cache=path).ask([ask("a", n=2)])
    assert CassetteTeacher(path).ask([ask("a", n=2)])[0].texts == ("said 0", "said 1")
    with pytest.raises(UnknownRequestError, match="no recorded answer 2 to the request"):
        CassetteTeacher(path).ask([ask("a", n=3)])
    with pytest.raises(UnknownRequestError, match="record it again"):
        CassetteTeacher(path).ask([ask("a", temperature=0.3)])
    (reply,) = CassetteTeacher(path, strict=False).ask([ask("b")])
    assert "no recorded answer" in str(reply.error)
    with pytest.raises(TeacherError, match="no such recording"):
        CassetteTeacher(tmp_path / "none.jsonl")


class FakeTime:
    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def test_no_minute_holds_more_than_its_limit() -> None:
    time = FakeTime()
    begun: list[float] = []

    async def run() -> None:
        limit = PerMinute(5, clock=time.clock, sleep=time.sleep)
        for n in range(23):
            await limit.take()
            begun.append(time.now)
            time.now += (n % 4) * 1.5

    asyncio.run(run())
    for start in begun:
        assert sum(start <= moment < start + 60 for moment in begun) <= 5
    assert begun[-1] - begun[0] < 300


def test_a_costly_request_passes_alone() -> None:
    time = FakeTime()

    async def run() -> list[float]:
        limit = PerMinute(10, clock=time.clock, sleep=time.sleep)
        begun = []
        for cost in (4, 50, 1):
            await limit.take(cost)
            begun.append(time.now)
        return begun

    assert asyncio.run(run()) == [100.0, 160.0, 220.0]


def test_token_limits_hold_back_calls() -> None:
    time = FakeTime()
    teacher = ChatTeacher(Counting(), tokens_per_minute=100, clock=time.clock, sleep=time.sleep, max_concurrency=2)
    teacher.ask([ask(f"{n}", max_tokens=45) for n in range(6)])  # 45 + 5 each: two a minute
    assert time.now == 100.0 + 120.0


def test_waits_double_up_to_the_longest_and_differ_between_requests() -> None:
    waits = [wait_before(n, "a", 1.0, 60.0) for n in range(1, 12)]
    for number, wait in enumerate(waits):
        full = min(60.0, 2.0**number)
        assert full / 2 <= wait <= full
    assert wait_before(3, "a", 1.0, 60.0) != wait_before(3, "b", 1.0, 60.0)
    assert wait_before(1, "a", 1.0, 60.0, 30.0) == 30.0
    assert wait_before(1, "a", 1.0, 60.0, 1e9) == 60.0


def test_a_teacher_can_be_asked_inside_a_running_loop() -> None:
    async def inside() -> str:
        return ScriptedTeacher({"a": "b"}).ask([ask("a")])[0].text

    assert asyncio.run(inside()) == "b"


def test_an_empty_batch_is_an_empty_list() -> None:
    assert ScriptedTeacher({}).ask([]) == []


def test_a_back_end_that_gives_nothing_is_asked_again() -> None:
    class Empty:
        calls = 0

        async def send(self, request: Request, samples: Sequence[int]) -> list[Sample]:
            self.calls += 1
            return [] if self.calls < 3 else [Sample("x")]

    assert ChatTeacher(Empty(), first_wait=0.0).ask([ask("a")])[0].tries == 3


def test_requests_that_are_none_are_refused() -> None:
    with pytest.raises(TeacherError, match="should be a list of role and content"):
        Request(())
    with pytest.raises(TeacherError, match="should be at least 1"):
        ask("a", n=0)
    with pytest.raises(TeacherError, match="max_concurrency and tries"):
        ChatTeacher(Counting(), tries=0)


def test_a_failure_is_written_down_with_its_messages(tmp_path: Path) -> None:
    class Failing:
        async def send(self, request: Request, samples: Sequence[int]) -> list[Sample]:
            raise BackendError("no", again=False)

    ChatTeacher(Failing(), failures=tmp_path / "f.jsonl").ask([ask("a", tag="row 3")])
    (row,) = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert row["tag"] == "row 3"
    assert row["messages"] == [{"role": "user", "content": "a"}]
    assert row["error"] == "no (tried 1 time)"
