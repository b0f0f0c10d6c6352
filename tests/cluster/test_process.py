"""Workers that are forked: they are as if they had been started anew, and their ends are heard of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from keepers import until

from resilin.cluster.forked import Forked, server_for
from resilin.cluster.process import FRESH, start_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")

TOLD = """
import json, os, sys, threading, time
if "resilin" in sys.modules:
    from resilin.parallel import activity
out = {
    "name": __name__, "arguments": sys.argv[1:], "folder": os.getcwd(), "path": sys.path[0],
    "leads": os.getsid(0) == os.getpid(),
    "variables": {k: v for k, v in os.environ.items() if k not in ("LC_CTYPE", "_", "HELD")}, "input": sys.stdin.read(),
    "threads": threading.active_count(),
    "began": round(time.monotonic() - activity.now.activity.since) if "resilin" in sys.modules else 0,
}
print(json.dumps(out), flush=True)
kind, _, value = sys.argv[-1].partition("=")
if kind == "exit":
    sys.exit(int(value))
if kind == "raise":
    raise RuntimeError(value)
if kind == "held":
    sys.stdout.write(os.read(int(os.environ["HELD"]), 100).decode())
if kind == "sleep":
    time.sleep(float(value))
"""


@pytest.fixture(autouse=True)
def _a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "told.py").write_text(TOLD)
    monkeypatch.chdir(tmp_path)


def forked(output: Path, *arguments: str, kept: dict[str, int] | None = None, **variables: str) -> Forked:
    environment = {**os.environ, **variables}
    with output.open("wb") as file:
        return server_for(environment).start("told", arguments, environment, file, kept or {})


def told(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.read_text().splitlines()[0])
    return found


def test_a_forked_process_sees_what_a_new_one_sees(tmp_path: Path) -> None:
    assert forked(tmp_path / "forked", "a b", "exit=0", MARK="ä=1").wait() == 0
    with (tmp_path / "new").open("wb") as file:
        environment = {**os.environ, "MARK": "ä=1"}
        command = [sys.executable, "-m", "told", "a b", "exit=0"]
        subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, start_new_session=True)
    found = told(tmp_path / "forked")
    assert found == told(tmp_path / "new")
    assert found["leads"]
    assert (found["variables"]["MARK"], found["arguments"], found["name"]) == ("ä=1", ["a b", "exit=0"], "__main__")


def test_a_forked_process_begins_when_it_is_forked(tmp_path: Path) -> None:
    """Not when the process that has imported everything did: who is added late would seem to have hung since."""
    assert forked(tmp_path / "first", "exit=0").wait() == 0
    time.sleep(2)
    assert forked(tmp_path / "late", "exit=0").wait() == 0
    assert told(tmp_path / "late")["began"] == 0


def test_signals_to_all_processes_of_a_job_leave_the_one_that_forks(tmp_path: Path) -> None:
    """Slurm sends them to every process of a step: what was forked gets them as it would without that one."""
    first = forked(tmp_path / "first", "sleep=600")
    until(lambda: (tmp_path / "first").read_text())
    server = server_for(os.environ)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        server.process.send_signal(number)
    first.send_signal(signal.SIGUSR1)
    assert first.wait() == -signal.SIGUSR1
    last = forked(tmp_path / "last", "sleep=600")
    until(lambda: (tmp_path / "last").read_text())
    last.send_signal(signal.SIGTERM)
    assert last.wait() == -signal.SIGTERM
    assert not server.gone


def test_ends_are_told_as_they_were(tmp_path: Path) -> None:
    assert forked(tmp_path / "3", "exit=3").wait() == 3
    assert forked(tmp_path / "raised", "raise=as it should").wait() == 1
    assert "RuntimeError: as it should" in (tmp_path / "raised").read_text()
    running = [forked(tmp_path / f"running{number}", "sleep=600") for number in range(3)]
    until(lambda: all((tmp_path / f"running{number}").read_text() for number in range(3)))
    assert [one.poll() for one in running] == [None] * 3
    running[1].kill()
    assert running[1].wait() == -signal.SIGKILL
    running[0].send_signal(signal.SIGTERM)
    assert running[0].wait() == -signal.SIGTERM
    running[0].kill()  # nobody any more
    assert (running[0].poll(), running[2].poll()) == (-signal.SIGTERM, None)
    running[2].kill()
    running[2].wait()


def test_a_descriptor_is_inherited_and_nothing_else_holds_it(tmp_path: Path) -> None:
    theirs, ours = os.pipe()
    reader = forked(tmp_path / "reader", "held", kept={"HELD": theirs})
    other = forked(tmp_path / "other", "sleep=600")
    os.close(theirs)
    os.write(ours, b"through the pipe")
    os.close(ours)  # of which there is no copy, or the reader would wait
    assert reader.wait() == 0
    assert "through the pipe" in (tmp_path / "reader").read_text()
    other.kill()
    other.wait()


def test_when_the_server_was_killed_ends_are_still_seen_and_another_takes_its_place(tmp_path: Path) -> None:
    lives = forked(tmp_path / "lives", "sleep=600")
    server = server_for(os.environ)
    os.kill(server.process.pid, signal.SIGKILL)
    until(lambda: lives.poll() is None and server.gone)
    assert lives.poll() is None
    lives.kill()
    assert lives.wait() == 1  # that it ended is seen, how it ended is not
    assert forked(tmp_path / "next", "exit=0").wait() == 0
    assert server_for(os.environ) is not server


def test_variables_that_libraries_read_early_have_a_server_of_their_own(tmp_path: Path) -> None:
    usual = server_for(os.environ)
    assert server_for({**os.environ, "MARK": "1"}) is usual
    other = server_for({**os.environ, "OMP_NUM_THREADS": "7"})
    assert other is not usual
    other.close()


def test_other_commands_and_whoever_wants_it_get_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "out").open("wb") as file:
        other = start_process([sys.executable, "-c", "print(1)"], os.environ, output=file)
        assert isinstance(other, subprocess.Popen)
        assert other.wait() == 0
        monkeypatch.setenv(FRESH, "1")
        fresh = start_process([sys.executable, "-m", "resilin", "--version"], os.environ, output=file)
        assert isinstance(fresh, subprocess.Popen)
        assert fresh.wait() == 0
        monkeypatch.delenv(FRESH)
        usual = start_process([sys.executable, "-m", "resilin", "--version"], os.environ, output=file)
        assert isinstance(usual, Forked)
        assert usual.wait() == 0
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[0] == "1"
    assert lines[1] == lines[2] != ""


def test_a_server_ends_with_whoever_asked_it(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from resilin.cluster.forked import server_for\n"
        "server = server_for(__import__('os').environ)\n"
        "print(server.process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    asks = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert asks.stdout is not None
    server = int(asks.stdout.readline())
    assert Path(f"/proc/{server}").exists()
    time.sleep(0.2)  # in the middle of its imports
    asks.kill()
    asks.communicate()
    until(lambda: not Path(f"/proc/{server}").exists() or "\nState:\tZ" in Path(f"/proc/{server}/status").read_text())


@pytest.mark.parametrize(("said", "told"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_large_pages_are_asked_for_unless_the_environment_says_otherwise(
    tmp_path: Path, said: dict[str, str], told: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", "import os; print(os.environ['THP_MEM_ALLOC_ENABLE'])"]
    with (tmp_path / "output").open("wb") as file:
        assert start_process(command, {**environment, **said}, output=file).wait() == 0
    assert (tmp_path / "output").read_text().split() == [told]
