"""Draw `dashboard.png`: a real elastic run is trained, workers are lost, leave and join, and a browser shows its page.

    OMP_NUM_THREADS=1 PYTHONPATH=tests/support .venv/bin/python docs/pictures/draw_dashboard.py

Needs Chromium and its driver (Debian: chromium, chromium-driver), and takes a minute or two.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

import torch
from browser import browsers, missing
from elastic_runs import settings_of, text_at
from PIL import Image

from resilin.cluster.elastic_job import ElasticJob
from resilin.cluster.faults import Fault
from resilin.cluster.local import worker_command
from resilin.dashboard.server import Server, Site
from resilin.run.elastic_start import launch
from resilin.run.events import Event, StepDone

OUT = Path(__file__).parent / "dashboard.png"
STEPS, SEEN, WIDTH = 250, 140, 1180


def train(folder: Path, seen: threading.Event) -> None:
    """A run in which worker 2 is lost in the middle of a step, worker 4 joins, and worker 0 leaves."""

    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 10:
            job.add()
        if isinstance(event, StepDone) and event.step == SEEN:
            seen.set()

    settings = settings_of(
        text_at(folder), parallel={"workers": 4, "timeout": 60}, evaluation={"every": 20, "batches": 3},
        train={"steps": STEPS, "batch_size": 16, "micro_batch_size": 1, "threads": 1, "device": "cpu"},
        checkpoint={"every": 50},
    )  # fmt: skip
    faults = [Fault(2, 60, "forward and backward of micro-batch 1"), Fault(0, 110, "adding gradients up", "leave")]
    ended = launch(settings, folder / "run", worker_command(), faults=faults, watch=watch)
    assert ended.code == 0, ended


def draw(folder: Path, seen: threading.Event) -> None:
    """The page of a run that goes on, as a PNG of few colours."""
    with Server(Site(folder)) as server, browsers() as open_one:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        window = open_one(size=(WIDTH, 900))
        window.open(server.url)
        seen.wait()
        window.until("Number(document.querySelector('.fact-value').innerText) > arguments[0]", SEEN)
        window.run("document.querySelector('#foot').textContent = ''")
        raw = folder / "page.png"
        window.picture(raw)
        Image.open(raw).convert("RGB").quantize(96).save(OUT, optimize=True)
        server.shutdown()


def main() -> None:
    """Train, and draw meanwhile."""
    if why := missing():
        sys.exit(why)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, seen = Path(name), threading.Event()
        (folder / "run").mkdir()
        drawing = threading.Thread(target=draw, args=(folder / "run", seen))
        drawing.start()
        train(folder, seen)
        drawing.join()


if __name__ == "__main__":
    main()
