"""A real HTTP server on this machine that answers as a list of scripts says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


def completion(*texts: str, **extra: Any) -> dict[str, Any]:
    """The body of a good answer."""
    choices = [
        {"index": n, "message": {"role": "assistant", "content": t}, "finish_reason": "stop"}
        for n, t in enumerate(texts)
    ]
    return {"choices": choices, "usage": {"prompt_tokens": 7, "completion_tokens": 3}, **extra}


class Server:
    """Answers POST by `respond(server, handler, body)`; remembers what it was asked.

    Attributes:
        asked: bodies, in the order in which they came.
        headers: of each.
        most: calls that waited for their answer at once, at most.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.respond: Callable[[Server, BaseHTTPRequestHandler, dict[str, Any]], None] = echo
        self.most = self.now = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.asked.append({**body, "path": self.path})
                    outer.headers.append(dict(self.headers))
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                self.waiting = True
                try:
                    outer.respond(outer, self, body)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    self.answered()

            def send_response(self, *args: Any) -> None:
                self.answered()
                super().send_response(*args)

            def answered(self) -> None:
                # A client that has its answer may call again before this thread ends.
                if self.waiting:
                    self.waiting = False
                    with outer.lock:
                        outer.now -= 1

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def send(handler: BaseHTTPRequestHandler, body: Any, status: int = 200, **headers: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(raw)


def half_an_answer(handler: BaseHTTPRequestHandler) -> None:
    """Fewer bytes of a body than were announced."""
    raw = json.dumps(completion("half an answer")).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(raw)))
    handler.end_headers()
    handler.wfile.write(raw[: len(raw) // 2])
    handler.wfile.flush()


def echo(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    said = body["messages"][-1]["content"]
    send(handler, completion(*(f"{said}#{n}" for n in range(body["n"]))))


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_key_and_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
