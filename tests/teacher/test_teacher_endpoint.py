"""The endpoint, against a real server on this machine."""

from __future__ import annotations

import asyncio
import json
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from resilin.teacher import ChatTeacher, Request, message
from resilin.teacher.endpoint import Endpoint, EndpointTeacher
from resilin.teacher.request import TeacherError

from .conftest import Server, completion, half_an_answer, send


def ask(text: str, **kw: Any) -> Request:
    return Request((message("user", text),), model="m", tag=text, **kw)


def teacher(server: Server, waits: list[float] | None = None, *, seconds: float = 5.0, **kw: Any) -> ChatTeacher:
    async def no_wait(time_asked: float) -> None:
        if waits is not None:
            waits.append(time_asked)
        await asyncio.sleep(0)

    return ChatTeacher(Endpoint(server.url, seconds=seconds), sleep=no_wait, **kw)


def test_replies_come_in_the_order_of_the_requests_and_calls_stay_within_the_concurrency(server: Server) -> None:
    def slow(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        said = body["messages"][-1]["content"]
        time.sleep(0.02 if int(said) % 3 else 0.0)
        send(handler, completion(f"answer {said}"))

    server.respond = slow
    replies = teacher(server, max_concurrency=4).ask([ask(str(n)) for n in range(20)])
    assert [reply.text for reply in replies] == [f"answer {n}" for n in range(20)]
    assert [reply.tag for reply in replies] == [str(n) for n in range(20)]
    assert 2 <= server.most <= 4
    assert replies[0].prompt_tokens == 7
    assert replies[0].completion_tokens == 3


def test_the_request_is_what_the_endpoint_knows(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    request = Request(
        (message("system", "Be brief."), message("user", "hi")),
        model="big",
        temperature=0.5,
        top_p=0.9,
        max_tokens=12,
        n=2,
        seed=3,
        stop=("END",),
    )
    (reply,) = teacher(server).ask([request])
    assert reply.texts == ("hi#0", "hi#1")
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert server.asked[0] == {
        "path": "/v1/chat/completions",
        "model": "big",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 12,
        "n": 2,
        "seed": 3,
        "stop": ["END"],
    }


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_passing_failures_are_tried_again_with_growing_waits(server: Server, status: int) -> None:
    def third_time(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if len(server.asked) < 4:
            send(handler, {"error": "busy"}, status)
        else:
            send(handler, completion("at last"))

    server.respond = third_time
    waits: list[float] = []
    (reply,) = teacher(server, waits).ask([ask("x")])
    assert reply.text == "at last"
    assert reply.tries == 4
    assert [0.5 * full <= wait <= full for wait, full in zip(waits, (1, 2, 4), strict=True)] == [True] * 3


def test_an_endpoint_that_says_how_long_is_waited_for(server: Server) -> None:
    def later(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if len(server.asked) < 3:
            send(handler, {}, 429, Retry_After="17" if len(server.asked) == 1 else "9999")
        else:
            send(handler, completion("ok"))

    server.respond = later
    waits: list[float] = []
    assert teacher(server, waits).ask([ask("x")])[0].text == "ok"
    assert waits == [17.0, 60.0]


def test_after_eight_tries_there_is_a_failure_row_and_the_rest_of_the_batch(server: Server, tmp_path: Path) -> None:
    def one_fails(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if body["messages"][-1]["content"] == "bad":
            send(handler, {"error": {"message": "overloaded"}}, 500)
        else:
            send(handler, completion("ok"))

    server.respond = one_fails
    replies = teacher(server, cache=tmp_path / "c.jsonl").ask([ask("a"), ask("bad"), ask("b")])
    assert [reply.error is None for reply in replies] == [True, False, True]
    assert replies[1].tries == 8
    assert replies[1].texts == ()
    assert "status 500" in str(replies[1].error)
    with pytest.raises(TeacherError, match="request 'bad' has no answer: status 500"):
        _ = replies[1].text
    (row,) = [json.loads(line) for line in (tmp_path / "c.failures.jsonl").read_text().splitlines()]
    assert row["tag"] == "bad"
    # A failure is not an answer: the next run asks for it again, and only for it.
    server.respond = lambda server, handler, body: send(handler, completion("better"))
    before = len(server.asked)
    again = teacher(server, cache=tmp_path / "c.jsonl").ask([ask("a"), ask("bad"), ask("b")])
    assert [reply.text for reply in again] == ["ok", "better", "ok"]
    assert [reply.cached for reply in again] == [True, False, True]
    assert len(server.asked) == before + 1


@pytest.mark.parametrize(
    "body",
    [
        b"<html>Bad gateway</html>",
        b"",
        b"\xff\xfe\x00",
        {"choices": []},
        {"choices": [{"message": {}}]},
        {"choices": [{"message": {"content": 5}}]},
        {"choices": "x"},
        [1, 2],
        {"error": "x"},
        b"[" * 5000,
    ],
)
def test_nonsense_is_asked_again_and_then_told(server: Server, body: Any) -> None:
    server.respond = lambda server, handler, asked: send(handler, body)
    (reply,) = teacher(server, tries=3).ask([ask("x")])
    assert "what is no chat completion" in str(reply.error)
    assert "tried 3 times" in str(reply.error)
    assert len(server.asked) == 3


def test_an_answer_that_ends_half_way_is_asked_again(server: Server) -> None:
    def half(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if len(server.asked) == 1:
            half_an_answer(handler)
            handler.connection.close()
        elif len(server.asked) == 2:  # nothing at all
            handler.connection.close()
        else:
            send(handler, completion("whole"))

    server.respond = half
    (reply,) = teacher(server).ask([ask("x")])
    assert reply.text == "whole"
    assert reply.tries == 3


def test_time_is_counted_to_the_last_byte(server: Server) -> None:
    def drip(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(30):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    server.respond = drip
    began = time.monotonic()
    (reply,) = teacher(server, seconds=0.3, tries=2).ask([ask("x")])
    assert "no answer within 0.3 s" in str(reply.error)
    assert time.monotonic() - began < 1.2


def test_a_server_that_is_silent_or_gone_is_told(server: Server) -> None:
    server.respond = lambda server, handler, body: time.sleep(0.6)
    (reply,) = teacher(server, seconds=0.2, tries=2).ask([ask("x")])
    assert "no answer within 0.2 s (tried 2 times)" in str(reply.error)
    gone = Server()
    gone.close()
    (reply,) = teacher(gone, tries=2).ask([ask("x")])
    assert "the connection failed" in str(reply.error)


def test_what_will_never_succeed_is_not_tried_again(server: Server) -> None:
    server.respond = lambda server, handler, body: send(handler, {"error": "too long"}, 400)
    replies = teacher(server).ask([ask("x"), ask("y")])
    assert [reply.tries for reply in replies] == [1, 1]
    assert len(server.asked) == 2


def test_a_wrong_key_stops_the_batch_and_is_never_shown(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server.respond = lambda server, handler, body: send(handler, {"error": "wrong key sk-very-secret"}, 401)
    made = teacher(server, max_concurrency=1, cache=tmp_path / "c.jsonl")
    replies = made.ask([ask(str(n)) for n in range(50)])
    assert all("is the key right?" in str(reply.error) for reply in replies)
    assert len(server.asked) == 1
    shown = "".join(map(str, replies)) + repr(made.backend) + "".join(capfd.readouterr())
    shown += "".join(path.read_text() for path in tmp_path.iterdir())
    assert "very-secret" not in shown


def test_a_redirection_is_not_followed_with_the_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    other = Server()
    server.respond = lambda server, handler, body: send(handler, b"", 307, Location=f"{other.url}/chat/completions")
    (reply,) = teacher(server).ask([ask("x")])
    other.close()
    assert "status 307" in str(reply.error)
    assert other.asked == []


def test_an_endpoint_that_gives_one_answer_at_a_time_is_asked_until_all_are_there(server: Server) -> None:
    server.respond = lambda server, handler, body: send(handler, completion(f"answer {len(server.asked)}"))
    (reply,) = teacher(server).ask([ask("x", n=3, seed=10)])
    assert reply.texts == ("answer 1", "answer 2", "answer 3")
    assert [body["n"] for body in server.asked] == [3, 2, 1]
    assert [body["seed"] for body in server.asked] == [10, 11, 12]


def test_log_probabilities_are_read(server: Server) -> None:
    body = completion("ab")
    body["choices"][0]["logprobs"] = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.0}]}
    server.respond = lambda server, handler, asked: send(handler, body)
    (reply,) = teacher(server).ask([ask("x", logprobs=True)])
    assert reply.logprobs == ((-0.5, -1.0),)


def test_what_a_filter_took_away_is_an_empty_text(server: Server) -> None:
    choice = {"message": {"content": None}, "finish_reason": "content_filter"}
    server.respond = lambda server, handler, asked: send(handler, {"choices": [choice]})
    (reply,) = teacher(server).ask([ask("x")])
    assert reply.texts == ("",)
    assert reply.finish_reasons == ("content_filter",)


@pytest.mark.parametrize("url", ["ftp://x/v1", "localhost:80", "https://user:pass@host/v1", "https://host/v1?key=1"])
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(TeacherError, match="base_url should look like"):
        Endpoint(url)


def test_settings_make_a_teacher_with_a_cache_named_by_further_fields(server: Server, tmp_path: Path) -> None:
    settings = {"base_url": server.url, "model": "m", "cache": str(tmp_path / "r.jsonl"), "extra": {"top_k": 5}}
    made = EndpointTeacher.model_validate(settings)
    assert made.build().ask([ask("x")])[0].text == "x#0"
    assert server.asked[0]["top_k"] == 5
    (name,) = [path.name for path in tmp_path.iterdir()]
    assert name.startswith("r-")
    assert made.build().ask([ask("x")])[0].cached
