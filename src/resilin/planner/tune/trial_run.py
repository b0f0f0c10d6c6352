"""One trial: settings that are planned are trained for a few steps, in processes of their own."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from resilin.planner.tune.trial import Outcome

WARM_UP = 2
_MEMORY = ("out of memory", "OutOfMemoryError", "Cannot allocate memory", "bad_alloc", "DefaultCPUAllocator")
_KILLED = (-9, 137)  # by the system, which takes who has most


def run_trial(settings: str, folder: Path, tokens: int, timeout: float) -> Outcome:
    """Trains settings in a folder, which is made anew and kept but for its checkpoints.

    Args:
        settings: TOML of a run of more steps than are not counted.
        folder: of the trial.
        tokens: of a step.
        timeout: seconds, after which it has failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = folder / "settings.toml"
    file.write_text(settings, encoding="utf-8")
    command = [sys.executable, "-m", "resilin", "train", str(file), "--folder", str(folder / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as started:
        try:
            said, _ = started.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            started.terminate()  # the launcher ends its workers
            said, _ = started.communicate()
            return Outcome("timeout", reason=f"not done after {timeout:g} s")
    (folder / "log.txt").write_text(said, encoding="utf-8")
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    if started.returncode:
        memory = started.returncode in _KILLED or any(word in said for word in _MEMORY)
        lines = said.strip().splitlines() or [f"exit code {started.returncode}"]
        return Outcome("oom" if memory else "crash", reason=lines[-1])
    seconds = _seconds(folder / "run" / "events.jsonl")
    spread = statistics.stdev(seconds) / statistics.fmean(seconds) if len(seconds) > 1 else 0.0
    return Outcome("ok", tokens / statistics.median(seconds), spread=spread)


def _seconds(events: Path) -> list[float]:
    found = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    steps = [float(event["seconds"]) for event in found if event["event"] == "step"]
    return steps[min(WARM_UP, len(steps) - 1) :]
