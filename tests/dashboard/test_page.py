"""The page as a browser shows it: headless Chromium, where there is one."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from browser import Browser, Open, browsers, missing
from elastic_runs import STEPS, check_met, settings_of, text_at
from event_lines import cluster, line, start, step, view

from resilin.cluster.elastic_job import ElasticJob, JobEnded
from resilin.cluster.faults import Fault
from resilin.cluster.local import worker_command
from resilin.dashboard.server import Server, Site
from resilin.run.elastic_start import launch
from resilin.run.events import Evaluated, Event, RunEnded, Saved

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")

TAB = "\ue004"
SETTINGS = {"name": "one", "train": {"batch_size": 12, "micro_batch_size": 2}}
EVIL = '<img src="x" onerror="document.title = 1"><script>document.title = 2</script>'


def elastic_log() -> list[Event]:
    """Forty steps; after the twentieth worker 1 is lost, and after the thirtieth worker 3 joins."""
    parts = {"0": {"groups": 0.01, "engine": 0.05, "plan": 0.02, "restore": 0.03, "migrate": 0.02, "verify": 0.01}}
    log: list[Event] = [
        cluster("change", time=1000.0, epoch=0, why="the run begins", members=[0, 1, 2], version=0, redone=0, kept=0,
                shards_moved=0, halting=0.0, adopting=0.2, view=view(0, (0, 1, 2))),
        start(time=999.0, settings=SETTINGS), *(step(n, 5.0 / n) for n in range(1, 21)),
        cluster("lost", time=1020.3, member=1, why="was killed by SIGKILL", silent=0.2),
        cluster("change", time=1020.5, epoch=1, why="member 1 was killed by SIGKILL", members=[0, 2], version=20,
                redone=0, kept=2, shards_moved=3, halting=0.05, adopting=0.15, parts=parts,
                bytes={"0": {"restore": 2000, "migrate": 500}}, view=view(1, (0, 2))),
        *(step(n, 5.0 / n) for n in range(21, 31)),
        Evaluated(time=1030.1, step=30, name="validation", metrics={"loss": 0.25}),
        Saved(time=1030.2, step=30, path="checkpoints/step-00000030", bytes=1000, seconds=0.1),
        cluster("ready", time=1030.3, member=3),
        cluster("change", time=1030.4, epoch=2, why="member 3 is ready to join", members=[0, 2, 3], version=30,
                redone=0, kept=0, shards_moved=2, halting=0.1, adopting=0.1, parts=parts, view=view(2, (0, 2, 3))),
        *(step(n, 5.0 / n) for n in range(31, 41)),
    ]  # fmt: skip
    return log


@pytest.fixture(scope="module")
def open_one() -> Iterator[Open]:
    with browsers() as opening:
        yield opening


@pytest.fixture(scope="module")
def window(open_one: Open) -> Browser:
    return open_one()


@pytest.fixture
def serve() -> Iterator[object]:
    servers: list[Server] = []

    def begin(folder: Path, host: str = "127.0.0.1") -> Server:
        server = Server(Site(folder), host)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def a_run(folder: Path, events: Sequence[Event]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_bytes(b"".join(map(line, events)))
    return folder


def show(window: Browser, server: Server, ready: bool = True) -> Browser:
    window.open(server.url)
    if ready:
        window.until("document.body.dataset.ready === 'yes'")
    return window


def test_a_run_is_shown_in_whole_and_without_complaints(window: Browser, serve, tmp_path: Path):
    end = [
        cluster("digest", time=1041.0, weights="00ff00ff00ff00ff"),
        RunEnded(time=1041.1, step=40, reason="completed", seconds=41.0),
        cluster("end", time=1041.2, good=True, why="all 40 steps were taken"),
    ]
    show(window, serve(a_run(tmp_path / "run", [*elastic_log(), *end])))
    assert window.text("#state") == "completed"
    told = window.text("#facts")
    for words in ("40", "of 100", "0.1250", "validation 0.2500", "128 units/s", "00ff00ff00ff00ff", "epoch 2"):
        assert words in told.replace("tokens/s", "units/s"), told
    cells = window.texts("#map .cell")
    assert [cell.split()[0] for cell in cells] == ["0", "2", "3"]
    assert all("host-" in cell and "micro-batches" in cell for cell in cells)
    assert window.texts("#changes .chip") == ["Worker joined", "Worker lost"]
    assert "Worker 1 was killed by SIGKILL." in window.text("#changes")
    assert "2 micro-batches kept" in window.text("#changes")
    joined, lost = window.run(
        """return [...document.querySelectorAll(".change")]
          .map((change) => [...change.querySelectorAll(".segment")].map((one) => one.dataset.part));"""
    )
    assert lost == ["detect", "halt", "edit", "replan", "restore", "migrate", "verify", "wait", "redo"]
    assert "detect" not in joined
    assert sorted(window.texts("#kinds .kind")) == ["End", "Save", "Worker joined", "Worker lost"]
    assert window.run("return document.querySelectorAll('.chart canvas').length") == 4
    assert window.complaints() == []


def inked(window: Browser) -> list[int]:
    """How many pixels of each chart have the colour of its curve."""
    return list(
        window.run(
            """const want = getComputedStyle(document.documentElement).getPropertyValue("--curve").trim();
            const [r, g, b] = [1, 3, 5].map((at) => parseInt(want.slice(at, at + 2), 16));
            return [...document.querySelectorAll(".chart canvas")].map((canvas) => {
              const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              const off = (at) => Math.abs(data[at] - r) + Math.abs(data[at + 1] - g) + Math.abs(data[at + 2] - b);
              let found = 0;
              for (let at = 0; at < data.length; at += 4) found += data[at + 3] > 128 && off(at) < 60;
              return found;
            });"""
        )
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_curve_is_drawn_in_either_theme(open_one: Open, serve, tmp_path: Path, dark: bool):
    window = show(open_one(dark=dark), serve(a_run(tmp_path / "run", elastic_log())))
    assert all(count > 150 for count in inked(window)), inked(window)
    shade = window.run("return getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, shade.removeprefix("rgb(").removesuffix(")").split(",")))
    assert light < 150 if dark else light > 600


def test_what_a_run_says_is_text_and_nothing_else(window: Browser, serve, tmp_path: Path):
    events: list[Event] = [
        cluster("change", time=1000.0, epoch=0, why=EVIL, members=[0], version=0, view=view(0, (0,))),
        start(settings={"name": EVIL}),
        step(1),
        cluster("lost", time=1001.5, member=1, why=EVIL, silent=0.1),
        cluster("change", time=1002.0, epoch=1, why=EVIL, members=[0], version=1, view=view(1, (0,))),
        Evaluated(time=1002.5, step=1, name=EVIL, metrics={"loss": 1.0}),
        cluster("end", time=1003.0, good=False, why=EVIL),
    ]
    show(window, serve(a_run(tmp_path / EVIL.replace("/", "-"), events)))
    assert EVIL in window.text("#name")
    assert EVIL in window.text("#changes")
    assert window.text("#state") == EVIL
    assert window.run("return document.querySelectorAll('main img, main script, header script').length") == 0
    assert EVIL in window.run("return document.title")
    assert window.complaints() == []


def test_a_run_that_goes_on_is_followed_without_a_reload(window: Browser, serve, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    show(window, serve(folder))
    assert window.text("#state") == "nothing has happened yet"
    assert "No step has been taken yet" in window.text("#no-steps")
    assert "no cluster to show" in window.text("#map")
    assert window.text("#no-changes") == "Nothing has happened yet."
    a_run(folder, elastic_log()[:22])
    window.until("document.querySelector('#facts .fact-value').innerText === '20'")
    assert window.texts("#map .cell .number") == ["0", "1", "2"]
    assert "Nobody was lost" in window.text("#no-changes")
    window.run("document.querySelector('#map .cell').marked = 'still me'")
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b"".join(map(line, elastic_log()[22:])))
    window.until("document.querySelector('#facts .fact-value').innerText === '40'")
    assert window.texts("#map .cell .number") == ["0", "2", "3"]
    assert window.run("return document.querySelector('#map .cell').marked") == "still me"  # focus and hover stay
    assert window.texts("#changes .chip") == ["Worker joined", "Worker lost"]


def test_the_keyboard_reaches_every_worker_and_marks_who_keeps_its_copies(window: Browser, serve, tmp_path: Path):
    show(window, serve(a_run(tmp_path / "run", elastic_log())))
    reached = []
    for _ in range(30):
        window.keys(TAB)
        reached.append(window.run("const e = document.activeElement; return e.dataset.key ?? e.id ?? e.name ?? ''"))
        if reached[-1] == "2":
            break
    assert "0" in reached
    assert reached[-1] == "2"
    assert window.texts("#map .cell.holds .number") == ["3"]  # the next on the ring keeps the copies of 2
    label = window.run("return document.activeElement.getAttribute('aria-label')")
    assert label.startswith("member 2, ended, host-0, micro-batches 2–3, owns shards ")
    assert label.endswith("copies at 3, keeps copies of 0") or "copies at 3" in label
    assert "auto" not in window.run("return getComputedStyle(document.activeElement).outlineStyle")


def test_a_part_of_the_curves_is_chosen_by_dragging(window: Browser, serve, tmp_path: Path):
    show(window, serve(a_run(tmp_path / "run", elastic_log())))
    window.run("document.querySelector('#charts').scrollIntoView()")
    box = "document.querySelector('.chart .u-over').getBoundingClientRect()"
    left, top, width = window.run(f"const box = {box}; return [box.left, box.top, box.width].map(Math.round)")
    assert window.run("return document.querySelector('#reset').offsetWidth") == 0
    y = top + 60
    window.pointer(("move", left + width // 4, y), ("down", left + width // 4, y), ("move", left + width // 3, y),
                   ("up", left + width // 2, y))  # fmt: skip
    assert window.until("document.querySelector('#reset').offsetWidth > 0")
    window.pointer(("move", left + 3, y))
    window.until("document.querySelector('.chart .told').innerText.startsWith('step 1')")
    told = window.text(".chart .told")
    assert 9 <= int(told.split()[1]) <= 12, told
    window.run("document.querySelector('#reset').click()")
    window.until("document.querySelector('#reset').offsetWidth === 0")
    window.pointer(("move", left + width // 2 + 1, y), ("move", left + round(width * 19 / 39), y))
    window.until("document.querySelector('.chart .told').innerText.includes('Worker lost: member 1 was killed')")
    window.run("[...document.querySelectorAll('#kinds .kind')].find((e) => e.innerText === 'Worker lost').click()")
    window.pointer(("move", left + 30, y), ("move", left + round(width * 19 / 39), y))
    window.until("!document.querySelector('.chart .told').innerText.includes('Worker lost')")
    window.run("document.querySelector('input[value=time]').click()")
    window.pointer(("move", left + 40, y), ("move", left + 41, y))
    window.until("/1970-01-01 /.test(document.querySelector('.chart .told').innerText)")
    assert window.complaints() == []


@pytest.mark.parametrize("width", [360, 390, 768])
def test_a_narrow_window_scrolls_in_one_direction_only(open_one: Open, serve, tmp_path: Path, width: int):
    events = [*elastic_log(), cluster("digest", time=1041.0, weights="00ff00ff00ff00ff")]
    window = show(open_one(size=(width, 800)), serve(a_run(tmp_path / "run", events)))
    assert window.run("return innerWidth") == width
    assert window.run("return document.documentElement.scrollWidth") <= width
    window.run("for (const one of document.querySelectorAll('details')) one.open = true")
    assert window.run("return document.documentElement.scrollWidth") <= width


def test_one_of_several_runs_is_chosen(window: Browser, serve, tmp_path: Path):
    a_run(tmp_path / "runs" / "a", elastic_log()[:10])
    a_run(tmp_path / "runs" / "b/c", elastic_log())
    show(window, serve(tmp_path / "runs"))
    assert sorted(window.run("return [...document.querySelectorAll('#runs option')].map((e) => e.value)")) == [
        "a",
        "b/c",
    ]
    for name, steps in (("a", "8"), ("b/c", "40")):
        window.run(
            "const s = document.querySelector('#runs'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))",
            name,
        )
        window.until("document.querySelector('#facts .fact-value').innerText === arguments[0]", steps)
        assert window.url.endswith(f"?run={name.replace('/', '%2F')}")


def test_the_token_is_asked_for_once_and_does_not_stay_in_the_address(open_one: Open, serve, tmp_path: Path):
    server, window = serve(a_run(tmp_path / "run", elastic_log()), "0.0.0.0"), open_one()
    plain = f"http://127.0.0.1:{server.server_address[1]}/"
    window.open(plain)
    assert "a token is needed" in window.text("body")
    window.open(f"{plain}?token={server.access.token}")
    window.until("document.body.dataset.ready === 'yes'")
    assert window.url == plain
    assert window.text("#facts .fact-value") == "40"
    assert window.run("return document.cookie") == ""  # no script can read it
    window.open(plain)
    window.until("document.body.dataset.ready === 'yes'")


def test_the_command_serves_until_ctrl_c_and_the_page_says_so(window: Browser, tmp_path: Path):
    folder = a_run(tmp_path / "run", elastic_log())
    command = [sys.executable, "-m", "resilin", "watch", str(folder), "--port", "0"]
    # A shell that starts tests in the background has it ignored, and whatever they start inherits that.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heeding)
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        assert told.startswith(f"{folder} is shown at http://127.0.0.1:"), told
        window.open(told.split()[-4])
        window.until("document.body.dataset.ready === 'yes'")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
    window.until("document.querySelector('#trouble').innerText.startsWith('The server does not answer')")
    assert window.text("#facts .fact-value") == "40"  # what is known stays


def test_many_workers_are_small_cells(window: Browser, serve, tmp_path: Path):
    members = tuple(range(200))
    log = [
        cluster("change", time=1000.0, epoch=0, why="the run begins", members=list(members), version=0,
                view=view(0, members)),
        start(settings=SETTINGS), step(1),
    ]  # fmt: skip
    show(window, serve(a_run(tmp_path / "run", log)))
    assert window.run("return document.querySelectorAll('#map .cell').length") == 200
    assert window.run("return document.querySelector('#map').offsetHeight") < 900
    assert window.run("return document.querySelector('#map .cell').title").startswith("member 0, ended, host-0")


@pytest.mark.slow
def test_a_real_elastic_run_is_watched_from_its_first_worker_to_its_digest(open_one: Open, serve, tmp_path: Path):
    (tmp_path / "run").mkdir()
    window = show(open_one(), serve(tmp_path / "run"))
    jobs: list[ElasticJob] = []
    told: list[list[str]] = []

    def look() -> None:
        """Worker 1 stands still until the page has shown all three; then it is killed."""
        running = "[...document.querySelectorAll('#map .cell[data-state=running] .number')].map((e) => e.innerText)"
        window.until(f"{running}.join() === '0,1,2' && document.querySelector('.fact-value').innerText === '3'")
        told.append(window.texts("#map .doing"))
        jobs[0].signal(1, signal.SIGKILL)

    looking = threading.Thread(target=look)
    looking.start()
    fault = Fault(1, 3, "adding gradients up", "stop")
    settings = settings_of(text_at(tmp_path), cluster={"silence": 120})
    ended = launch(
        settings, tmp_path / "run", worker_command(), faults=[fault], watch=lambda job, event: jobs.append(job)
    )
    looking.join()
    assert ended == JobEnded(0, "")
    check_met(tmp_path / "run", [fault])
    assert all(told[0]), told  # everyone does something
    window.until("document.querySelector('#state').innerText === 'completed'")
    window.until("document.querySelector('#facts .fact-value').innerText === arguments[0]", str(STEPS))
    assert window.texts("#map .cell .number") == ["0", "2"]
    assert window.texts("#changes .chip") == ["Worker lost"]
    assert "Digest of the weights" in window.text("#facts")
    assert window.complaints() == []
