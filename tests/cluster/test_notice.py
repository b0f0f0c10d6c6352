"""Notices that a machine will be taken away, from files, functions, and servers that answer as clouds do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from resilin.cluster.notice import await_notice, aws, azure, gcp, notice_of
from resilin.config import UserError

Answer = Callable[[str, str, dict[str, str]], tuple[int, str]]


class Cloud:
    """A metadata service: `answer` gives status and text for (method, path, headers)."""

    def __init__(self) -> None:
        self.answer: Answer = lambda method, path, headers: (404, "")
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def _reply(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                status, text = cloud.answer(self.command, self.path, headers)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_PUT = _reply

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    made = Cloud()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_ec2_is_asked_with_a_token(cloud: Cloud):
    marked = False

    def answer(method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if (method, path) == ("PUT", "/latest/api/token") and headers["x-aws-ec2-metadata-token-ttl-seconds"]:
            return 200, "a-token"
        if headers.get("x-aws-ec2-metadata-token") != "a-token":
            return 401, ""
        found = marked and path == "/latest/meta-data/spot/instance-action"
        return (200, '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}') if found else (404, "")

    cloud.answer = answer
    assert not aws(cloud.url)
    marked = True
    assert aws(cloud.url)


def test_compute_engine_says_true(cloud: Cloud):
    said = "FALSE"

    def answer(method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        good = path == "/computeMetadata/v1/instance/preempted" and headers.get("metadata-flavor") == "Google"
        return (200, said) if good else (403, "")

    cloud.answer = answer
    assert not gcp(cloud.url)
    said = "TRUE\n"
    assert gcp(cloud.url)


def test_azure_lists_events_of_other_machines_too(cloud: Cloud):
    events = [{"EventType": "Preempt", "Resources": ["set_1"]}, {"EventType": "Reboot", "Resources": ["set_0"]}]

    def answer(method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if headers.get("metadata") != "true":
            return 400, ""
        return 200, "set_0" if path.startswith("/metadata/instance/compute/name") else json.dumps({"Events": events})

    cloud.answer = answer
    assert not azure(cloud.url)
    events.append({"EventType": "Preempt", "Resources": ["set_2", "set_0"]})
    assert azure(cloud.url)


def test_a_url_answers_once_there_is_a_notice(cloud: Cloud):
    asked = notice_of(f"{cloud.url}/evicted")
    assert asked is not None
    assert not asked()
    cloud.answer = lambda method, path, headers: (200, "") if path == "/evicted" else (404, "")
    assert asked()


def test_a_file_that_appears_or_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = notice_of(str(tmp_path / "evicted"))
    assert asked is not None
    assert not asked()
    (tmp_path / "evicted").touch()
    assert asked()
    (tmp_path / "spot_of_mine.py").write_text("def evicted():\n    return True\n\nnothing = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = notice_of("spot_of_mine:evicted")
    assert mine is not None
    assert mine()
    assert notice_of("") is None
    with pytest.raises(UserError, match="has no attribute 'evikted'"):
        notice_of("spot_of_mine:evikted")
    with pytest.raises(UserError, match="that is no function, but int"):
        notice_of("spot_of_mine:nothing")
    with pytest.raises(UserError, match="No module named 'spot_of_nobody'"):
        notice_of("spot_of_nobody:evicted")


def test_it_is_asked_until_it_says_so_and_an_error_is_none(capsys: pytest.CaptureFixture[str]):
    answers: list[object] = [False, OSError("no answer"), OSError("no answer"), False, True, True]
    came, count = threading.Event(), []

    def asked() -> object:
        count.append(1)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    await_notice(asked, 0.001, came.set)
    assert came.wait(20)
    assert (len(count), len(answers)) == (5, 1)
    assert capsys.readouterr().err.count("cannot be asked") == 1
