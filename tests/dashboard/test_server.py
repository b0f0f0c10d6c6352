"""The server: who is answered, with what, and what is never given away."""

from __future__ import annotations

import http.client
import json
import os
import posixpath
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from event_lines import line, start, step

from resilin.config import UserError
from resilin.dashboard.server import Server, Site


def no_launcher(workers: Path) -> dict[str, Any]:
    raise FileNotFoundError(workers)


class Client:
    """Asks a server, as a browser does not: byte by byte what is wanted."""

    def __init__(self, server: Server) -> None:
        self.server, self.port = server, server.server_address[1]

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, path: str, **headers: str) -> Any:
        status, _, body = self.ask(path, **headers)
        assert status == 200, body
        return json.loads(body)

    def until(self, path: str, right: Callable[[Any], bool]) -> Any:
        end = time.monotonic() + 200
        while not right(told := self.json(path)):
            assert time.monotonic() < end, told
            time.sleep(0.02)
        return told


Serve = Callable[..., Client]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[Server] = []

    def begin(folder: Path, host: str = "127.0.0.1") -> Client:
        server = Server(Site(folder, no_launcher), host)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return Client(server)

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def a_run(folder: Path, steps: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    log = b"".join([line(start()), *(line(step(number, 10.0 / number)) for number in range(1, steps + 1))])
    (folder / "events.jsonl").write_bytes(log)
    return folder


def test_the_page_and_all_it_needs_come_from_here(serve: Serve, tmp_path: Path):
    client = serve(a_run(tmp_path / "run"))
    wanted, seen = ["/"], set()
    while wanted:
        path = wanted.pop()
        if path in seen:
            continue
        seen.add(path)
        status, headers, body = client.ask(path)
        assert status == 200, path
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        text = body.decode()
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") or "vendor" in path, path
        if path == "/":
            wanted += re.findall(r'(?:href|src)="(/[^"]+)"', text)
        elif path.endswith(".js"):
            imported = re.findall(r'from "(\.[^"]+)"', text)
            wanted += [posixpath.normpath(posixpath.join(path, "..", at)) for at in imported]
    assert {"/", "/style.css", "/js/main.js", "/js/charts.js", "/vendor/uplot/uPlot.esm.js"} <= seen


def test_no_script_of_ours_writes_markup():
    for path in (Path(__file__).parents[2] / "src/resilin/dashboard/static/js").glob("*.js"):
        text = path.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text, path


def test_the_library_is_the_version_that_is_noted():
    folder = Path(__file__).parents[2] / "src/resilin/dashboard/static/vendor"
    assert "(v1.6.32)" in (folder / "uplot/uPlot.esm.js").read_text()[:400]
    assert "| 1.6.32 | MIT" in (folder / "README.md").read_text()
    assert "The MIT License" in (folder / "uplot/LICENSE").read_text()


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd", "/..%2f..%2f..%2fetc/passwd", "/js/../../server.py", "/%2e%2e/server.py",
        "//etc/passwd", "/vendor/README.md", "/js/", "/static/index.html", "/api/state/..", "/index.html/..",
        "http://localhost/../server.py", "/events.jsonl", "/api/",
    ],
)  # fmt: skip
def test_there_is_no_way_to_another_file(serve: Serve, tmp_path: Path, path: str):
    assert serve(a_run(tmp_path / "run")).ask(path)[0] == 404


@pytest.mark.parametrize("name", ["..", "../other", "/etc", "one/../../other", "", "%2e%2e", "one/."])
def test_a_run_is_found_by_its_name_in_the_list_alone(serve: Serve, tmp_path: Path, name: str):
    a_run(tmp_path / "other")
    a_run(tmp_path / "runs" / "one")
    client = serve(tmp_path / "runs")
    assert client.ask("/api/state?run=one")[0] == 200
    status, _, body = client.ask(f"/api/state?run={name}")
    if name == "":  # no name at all: the newest
        assert (status, json.loads(body)["folder"]) == (200, str(tmp_path / "runs" / "one"))
    else:
        assert (status, json.loads(body)) == (404, {"error": "there is no such run"})


def test_a_link_out_of_the_folder_is_no_run(serve: Serve, tmp_path: Path):
    a_run(tmp_path / "other")
    a_run(tmp_path / "runs" / "one")
    (tmp_path / "runs" / "two").symlink_to(tmp_path / "other")
    assert serve(tmp_path / "runs").json("/api/runs")["runs"] == ["one"]


def test_a_page_of_another_site_that_calls_itself_this_machine_is_not_answered(serve: Serve, tmp_path: Path):
    client = serve(a_run(tmp_path / "run"))
    for path in ("/", "/api/state", "/api/runs"):
        status, headers, body = client.ask(path, Host=f"evil.example:{client.port}")
        assert (status, "access-control-allow-origin" in headers) == (421, False)
        assert b"one" not in body
    assert client.ask("/", Host=f"localhost:{client.port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_can_be_changed(serve: Serve, tmp_path: Path, method: str):
    assert serve(a_run(tmp_path / "run")).ask("/api/state", method)[0] == 501


def test_head_tells_the_length_and_no_more(serve: Serve, tmp_path: Path):
    client = serve(a_run(tmp_path / "run"))
    status, headers, body = client.ask("/", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) == len(client.ask("/")[2])


def test_others_need_the_token_once_and_then_the_cookie(serve: Serve, tmp_path: Path):
    client = serve(a_run(tmp_path / "run"), "0.0.0.0")
    token = client.server.access.token
    assert client.server.url.endswith(f"/?token={token}")
    for path in ("/", "/api/state", "/api/runs", "/js/main.js", f"/api/state?token={token}", "/?token=", "/?token=x"):
        status, headers, body = client.ask(path)
        assert (status, "set-cookie" in headers) == (401, False), path
        assert b"one" not in body.replace(b"one has", b"")
    status, headers, _ = client.ask(f"/?token={token}")
    assert (status, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"].split(";")[0]
    assert client.ask("/", Cookie=cookie)[0] == 200
    assert client.json("/api/runs", Cookie=cookie)["runs"] == ["run"]
    assert client.ask("/", Cookie=cookie[:-1])[0] == 401


def test_curves_come_as_asked_for(serve: Serve, tmp_path: Path):
    client = serve(a_run(tmp_path / "run", 400))
    client.until("/api/state", lambda told: told["steps"] == 400)
    assert len(client.json("/api/curves?points=40")["loss"]["x"]) <= 40
    assert client.json("/api/curves?low=10&high=12")["loss"]["x"] == [9, 10, 11, 12, 13]
    assert client.json("/api/curves?by=time&low=1010&high=1010")["loss"]["x"] == [1009, 1010, 1011]
    assert len(client.json("/api/curves?points=-3")["loss"]["x"]) == 4
    assert len(client.json("/api/curves?points=99999999")["loss"]["x"]) == 400
    for query in ("by=loss", "low=x", "points=many", "low=nan", "points=1e3"):
        assert client.ask(f"/api/curves?{query}")[0] == 400


def test_a_run_that_goes_on_is_followed(serve: Serve, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    client = serve(folder)
    assert client.json("/api/state")["run"]["state"] == "empty"
    a_run(folder, 3)
    version = client.until("/api/state", lambda told: told["steps"] == 3)["version"]
    whole = line(step(4, 7.0))
    with (folder / "events.jsonl").open("ab") as file:
        file.write(whole[:30])
        file.flush()
        assert client.json("/api/state")["steps"] == 3
        file.write(whole[30:])
    told = client.until("/api/state", lambda told: told["steps"] == 4)
    assert (told["run"]["last"]["loss"], told["version"] > version, told["read"]["strange"]) == (7.0, True, 0)


def test_all_runs_below_a_folder_are_listed_newest_first(serve: Serve, tmp_path: Path):
    for age, name in enumerate(["new", "sweep/a", "sweep/b", "deep/er/c"]):
        log = a_run(tmp_path / name) / "events.jsonl"
        os.utime(log, (1e9 - age, 1e9 - age))
    client = serve(tmp_path)
    assert client.json("/api/runs")["runs"] == ["new", "sweep/a", "sweep/b", "deep/er/c"]
    assert client.json("/api/state?run=sweep%2Fb")["folder"] == str(tmp_path / "sweep/b")
    a_run(tmp_path / "later")
    assert client.json("/api/runs")["runs"][0] == "later"


def test_a_folder_that_is_not_there_and_a_port_that_is_taken_are_told(serve: Serve, tmp_path: Path):
    with pytest.raises(UserError, match="there is no such folder; a run's folder was expected"):
        Site(tmp_path / "nothing")
    port = serve(a_run(tmp_path / "run")).port
    with pytest.raises(UserError, match=f"127.0.0.1:{port}: cannot listen there .* another --port may do"):
        Server(Site(tmp_path), "127.0.0.1", port)


def test_the_command_prints_its_address_and_ends_with_ctrl_c(tmp_path: Path):
    folder = a_run(tmp_path / "run")
    command = [sys.executable, "-m", "resilin", "watch", str(folder), "--port", "0"]
    # Tests that a shell runs in the background are started with Ctrl-C ignored, and so would be what they start.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    try:
        told = process.stdout.readline()
        found = re.fullmatch(
            rf"{re.escape(str(folder))} is shown at (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", told
        )
        with urllib.request.urlopen(f"{found[1]}api/runs", timeout=30) as answer:
            assert json.load(answer)["runs"] == ["run"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


def test_the_command_says_what_is_wrong(tmp_path: Path):
    command = [sys.executable, "-m", "resilin", "watch", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'nothing'}: there is no such folder")
