"""Real runs of planned settings: seconds of a step and peak memory, as the workers of `resilin train` have them."""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import sysconfig
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from resilin.cluster.local import run_workers
from resilin.cluster.position import position
from resilin.config import load_settings
from resilin.parallel.world import World
from resilin.run.settings import RunSettings

WARM_UP = 2
_LOOKS = 0.005  # seconds between two looks at the memory
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        seconds: of each step after the first ones.
        memory: bytes that each worker's peak is above what it had when it began; of runs that give back only.
    """

    seconds: list[float]
    memory: list[int]

    @property
    def median(self) -> float:
        """Of the steps."""
        return statistics.median(self.seconds)


def text_files() -> list[str]:
    """Text that every machine with Python has."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [str(library / name) for name in ("argparse.py", "ast.py", "datetime.py", "inspect.py", "typing.py")]


def resident() -> int:
    """Bytes of this process now; of pages that several workers of the machine see, its share."""
    told: dict[str, int] = {}
    for file in ("status", "smaps_rollup"):
        for line in Path(f"/proc/self/{file}").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if value.endswith("kB"):
                told[name] = int(value.split()[0]) * 1024
    return told["VmRSS"] - told["RssShmem"] + told["Pss_Shmem"]


class Peak:
    """The most that was resident at any look, from now on."""

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(_LOOKS):
            self.bytes = max(self.bytes, resident())

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self.bytes


def _give_back() -> bool:
    """Tell malloc to return every tensor's memory as soon as it is freed: the peak is then of what is held."""
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_THRESHOLD, 1 << 16) and libc.mallopt(_TRIM_THRESHOLD, 1 << 16))


def work(settings_file: Path, folder: Path, *, give_back: bool) -> None:
    """As one of the workers: trains, and leaves what it measured in the folder.

    Args:
        settings_file: of the run.
        folder: of the run.
        give_back: for measuring memory, not time.
    """
    import torch

    from resilin.run import build
    from resilin.run.start import start_run

    place = position()
    torch.set_num_threads(1)
    if give_back:
        build.keep_freed_memory = _give_back  # type: ignore[attr-defined]
        _give_back()
    # What a first backward pass and optimizer load of torch is no part of the model.
    x = torch.ones(4, 4, requires_grad=True)
    (x @ x).sum().backward()
    before, peak = resident(), Peak() if give_back else None
    settings = load_settings(RunSettings, settings_file)
    start_run(settings, folder, place=place)
    rank = 0 if place is None else place.rank
    if peak is not None:
        (folder / f"memory-{rank}.json").write_text(json.dumps(peak.end() - before), encoding="utf-8")


def measure(settings: str, script: str, *, give_back: bool) -> Measured:
    """Run settings with as many workers as they say, and read what they measured.

    Args:
        settings: TOML.
        script: of the benchmark; with `--settings FILE --folder FOLDER` it calls `work`.
        give_back: for measuring memory, not time.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        folder.mkdir()
        file = Path(place) / "planned.toml"
        file.write_text(settings, encoding="utf-8")
        parallel = load_settings(RunSettings, file).parallel
        workers = max(parallel.workers, 1)
        command = [sys.executable, script, "--settings", str(file), "--folder", str(folder)]
        command += ["--give-back"] * give_back
        degrees = parallel.degrees(workers)
        places = [World(degrees, rank).where or "worker" for rank in range(workers)]
        ended = run_workers(command, places, folder / "workers")
        if ended.code:
            logs = [path.read_text(encoding="utf-8", errors="replace") for path in folder.rglob("*.log")]
            raise SystemExit("\n".join([f"{settings}\nfailed: {ended.message}", *logs]))
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
        seconds = [event["seconds"] for event in events if event["event"] == "step"][WARM_UP:]
        memory = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("memory-*.json"))]
    return Measured(seconds, memory)
