"""The server of the page: files of this package, and what followers tell, as JSON. It changes nothing anywhere."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from resilin import __version__
from resilin.config import UserError
from resilin.dashboard.access import Access
from resilin.dashboard.follower import Follower
from resilin.dashboard.launcher import Ask, ask_launcher
from resilin.dashboard.runs import runs_at

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FIRST = 0.3  # seconds that a page waits for a log to be read, before it is told that it is being read
_POINTS = 4, 800, 5000  # of a curve: at least, unless asked for, at most


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered with."""

    body: bytes
    kind: str
    status: HTTPStatus = HTTPStatus.OK
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def json(cls, value: Any, status: HTTPStatus = HTTPStatus.OK) -> Answer:
        """JSON values."""
        raw = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
        return cls(raw, "application/json", status)

    @classmethod
    def text(cls, status: HTTPStatus, text: str) -> Answer:
        """Words for people."""
        return cls(f"{text}\n".encode(), "text/plain; charset=utf-8", status)


class Site:
    """What there is to be seen.

    Args:
        folder: a run's, or one with runs below it.
        ask: asks a run's launcher.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, folder: Path, ask: Ask = ask_launcher) -> None:
        self._folder, self._ask = folder, ask
        self._runs = runs_at(folder)
        self._followers: dict[str, Follower] = {}

    @cached_property
    def _files(self) -> dict[str, Answer]:
        """By path: so there is no path to any other file."""
        root = files("resilin.dashboard") / "static"
        found = dict(_below(root, ""))
        return {"/": found["/index.html"], **found}

    def answer(self, path: str, query: Mapping[str, str]) -> Answer:
        """To a GET.

        Args:
            path: of the URL.
            query: of the URL; of several values the last.
        """
        if path in self._files:
            return self._files[path]
        if path == "/api/runs":
            self._runs = runs_at(self._folder)
            return Answer.json({"runs": list(self._runs), "folder": str(self._folder), "version": __version__})
        if path not in ("/api/state", "/api/curves"):
            return Answer.text(HTTPStatus.NOT_FOUND, "there is no such page")
        follower = self._follower(query.get("run"))
        if follower is None:
            return Answer.json({"error": "there is no such run"}, HTTPStatus.NOT_FOUND)
        if path == "/api/state":
            follower.wait(_FIRST)
            return Answer.json(follower.state())
        try:
            by = query.get("by", "step")
            low, high = float(query.get("low", "-inf")), float(query.get("high", "inf"))
            points = int(query.get("points", _POINTS[1]))
        except ValueError:
            by, low, high, points = "", 0.0, 0.0, 0
        if by not in ("step", "time") or math.isnan(low) or math.isnan(high):
            return Answer.json(
                {"error": "by is step or time; low, high and points are numbers"}, HTTPStatus.BAD_REQUEST
            )
        return Answer.json(follower.curves(by, low, high, min(max(points, _POINTS[0]), _POINTS[2])))

    def _follower(self, name: str | None) -> Follower | None:
        """Of a run by its name in the list, never by a path; without a name, of the first."""
        name = next(iter(self._runs)) if name is None else name
        if name not in self._runs:
            return None
        follower = self._followers.setdefault(name, Follower(self._runs[name], self._ask))
        follower.wanted()
        return follower


def _below(folder: Traversable, path: str) -> list[tuple[str, Answer]]:
    found: list[tuple[str, Answer]] = []
    for one in folder.iterdir():
        at = f"{path}/{one.name}"
        if one.is_dir():
            found += _below(one, at)
        elif (kind := _TYPES.get(one.name.rpartition(".")[2])) is not None:
            found.append((at, Answer(one.read_bytes(), kind)))
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "resilin", ""
    timeout = 60.0
    server: Server

    def do_GET(self) -> None:
        self._send(self._answer())

    do_HEAD = do_GET

    def _answer(self) -> Answer:
        access = self.server.access
        if not access.knows_host(self.headers.get("Host")):
            return Answer.text(
                HTTPStatus.MISDIRECTED_REQUEST,
                "this server answers requests for localhost; start it with --host for another name",
            )
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if url.path == "/" and access.right(query.get("token", "")):
            # Once it is in a cookie, the token need not stay in the address, which is shown and kept in histories.
            headers = ("Location", "/"), ("Set-Cookie", access.set_cookie())
            return Answer(b"", "text/plain", HTTPStatus.SEE_OTHER, headers)
        if not access.admits(self.headers.get("Cookie")):
            return Answer.text(
                HTTPStatus.UNAUTHORIZED, "a token is needed: open the address that `resilin watch` has printed"
            )
        return self.server.site.answer(url.path, query)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in (*_HEADERS.items(), *answer.headers):
            self.send_header(name, value)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not told."""


class Server(ThreadingHTTPServer):
    """Listens from the moment it is made; `serve_forever` answers.

    Args:
        site: what there is to be seen.
        host: the address to listen at.
        port: 0: any that is free.

    Raises:
        UserError: it cannot listen there.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, site: Site, host: str = "127.0.0.1", port: int = 0) -> None:
        self.site, self.access = site, Access.at(host)
        if ":" in host:
            import socket

            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise UserError(
                f"{host}:{port}: cannot listen there ({error.strerror or error}); another --port may do, 0 takes any"
            ) from None

    @property
    def url(self) -> str:
        """What to open, the token included."""
        host, port = str(self.server_address[0]), self.server_address[1]
        name = f"[{host}]" if ":" in host else host
        return f"http://{name}:{port}/" + (f"?token={self.access.token}" if self.access.token else "")

    def server_bind(self) -> None:
        """Without the look-up of this machine's name, which may take seconds."""
        import socketserver

        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)
