"""Elastic runs whose processes torchrun, or srun, starts: real torchrun, and the variables that Slurm sets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from elastic_checks import changes, check_same, equal, events, states
from elastic_runs import STEPS, check_met, settings_of
from keepers import environment_of, resilin, until

from resilin.cluster.faults import Fault, to_environment
from resilin.cluster.place import FILE, ask, found
from resilin.config import settings_to_toml


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that end with the test."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def settings_file(text: Path, folder: Path, **over: Any) -> Path:
    path = folder / "run.toml"
    path.write_text(settings_to_toml(settings_of(text, **{"parallel": {"workers": 0}, **over})))
    return path


def torchrun(workers: int, *arguments: object, log: Path, **more: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "-m", "resilin", *map(str, arguments),
    ]  # fmt: skip
    with log.open("wb") as out:
        return subprocess.Popen(command, env=environment_of(more), stdout=out, stderr=out, start_new_session=True)


def srun(rank: int, ranks: int, *arguments: object, log: Path, **more: str) -> subprocess.Popen[bytes]:
    """One task of a job on one node, as Slurm would start it."""
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(ranks),
        "SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NODELIST": "node[1]", "SLURM_STEP_TASKS_PER_NODE": str(ranks), "SLURM_CPUS_ON_NODE": str(ranks),
    }  # fmt: skip
    return resilin(*arguments, log=log, **slurm, **more)


def workers_of(folder: Path) -> dict[int, int]:
    """The process of each worker."""
    told = ask(found(folder / "workers"), {"command": "status"})
    return {one["number"]: int(one["process"]) for one in told["members"]}


def steps(folder: Path) -> int:
    return len(events(folder, "step")) if (folder / "events.jsonl").exists() else 0


def test_under_torchrun_a_worker_is_killed_and_another_takes_its_place(
    text: Path, undisturbed: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]]
):
    file = settings_file(text, tmp_path, cluster={"elastic": True, "replace": True})
    faults = [Fault(1, 3, "adding gradients up"), Fault(0, 6, "updating weights")]
    given = to_environment(faults)
    job = torchrun(3, "train", file, "--folder", tmp_path / "run", log=tmp_path / "log", **given)
    started.append(job)
    assert job.wait(200) == 0, (tmp_path / "log").read_text()
    check_met(tmp_path / "run", faults)
    check_same(tmp_path / "run", undisturbed)
    assert len(changes(tmp_path / "run")) >= 3
    assert not (tmp_path / "run" / "workers" / FILE).exists()
    assert (tmp_path / "log").read_text().count("run completed") == 1  # the first alone speaks


def lineage(process: int) -> set[int]:
    """A process and all above it, however many programs are between a worker and whoever was started."""
    found = set()
    while process > 1:
        found.add(process)
        process = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return found


@pytest.mark.slow
def test_torchrun_starts_all_anew_when_the_coordinator_is_lost_and_they_go_on(
    text: Path, undisturbed: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]]
):
    file = settings_file(text, tmp_path, train={"steps": STEPS})
    log, folder = tmp_path / "log", tmp_path / "run"
    job = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
            "--monitor-interval", "0.1", "-m", "resilin", "train", str(file), "--folder", str(folder), "--resume",
        ],
        env=environment_of(), stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    started.append(job)
    until(lambda: any((folder / "checkpoints").glob("step-*")) and steps(folder) > 5, 200)
    coordinator = json.loads((folder / "workers" / FILE).read_text())["process"]
    os.kill(coordinator, signal.SIGKILL)
    assert job.wait(200) == 0, log.read_text()
    assert equal(states(folder, STEPS)["model"], states(undisturbed, STEPS)["model"])
    assert len(events(folder, "start")) == 2


@pytest.mark.slow
def test_a_task_of_slurms_leaves_at_its_notice_and_the_others_go_on(
    text: Path, undisturbed: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]]
):
    file = settings_file(text, tmp_path)
    stops = Fault(0, 4, "adding gradients up", "stop")
    hold: Mapping[str, str] = to_environment([stops])
    for rank in range(3):
        log = tmp_path / f"task{rank}.log"
        started.append(
            srun(rank, 3, "train", file, "--folder", tmp_path / "run", "cluster.silence=60", log=log, **hold)
        )
    until(lambda: steps(tmp_path / "run") > 2, 200)
    numbers = workers_of(tmp_path / "run")
    stopped = numbers[0]
    above = lineage(stopped)
    leaves = next(task for task in started[1:] if task.pid not in above)  # any task's worker may be the first
    leaves.send_signal(signal.SIGUSR1)  # srun --signal=USR1@120
    until(lambda: any(told["what"] == "leaving" for told in events(tmp_path / "run", "cluster")))
    until(lambda: Path(f"/proc/{stopped}/stat").read_text().split()[2] == "T")
    os.kill(stopped, signal.SIGCONT)
    assert [process.wait(200) for process in started] == [0, 0, 0], (tmp_path / "task0.log").read_text()
    check_met(tmp_path / "run", [stops])
    check_same(tmp_path / "run", undisturbed)
    assert [len(change["members"]) for change in changes(tmp_path / "run")] == [3, 2]


def test_when_slurm_ends_the_job_it_is_saved(text: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]]):
    file = settings_file(text, tmp_path, train={"steps": 2000}, evaluation={"every": 0}, checkpoint={"every": 0})
    for rank in range(2):
        log = tmp_path / f"task{rank}.log"
        started.append(srun(rank, 2, "train", file, "--folder", tmp_path / "run", log=log))
    until(lambda: steps(tmp_path / "run") > 3, 200)
    for process in started:  # scancel, or the end of the time
        process.terminate()
    codes = [process.wait(60) for process in started]
    assert codes[0] == 130, (tmp_path / "task0.log").read_text()
    assert codes[1] in (0, 130)  # it may have left before
    (end,) = events(tmp_path / "run", "end")
    assert states(tmp_path / "run", end["step"])["run"]["step"] == end["step"]


def below(process: int) -> list[int]:
    """A process and all that it has started, and they have, as Slurm finds those of a step."""
    told = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(each for child in told for each in below(int(child)))]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_of_slurms_to_all_processes_of_a_job_is_one_wish(
    number: signal.Signals, text: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]]
):
    """Tasks, workers and what forks them get it, and workers hear of it from the others besides."""
    file = settings_file(text, tmp_path, train={"steps": 20_000}, evaluation={"every": 0}, checkpoint={"every": 0})
    for rank in range(2):
        log = tmp_path / f"task{rank}.log"
        started.append(srun(rank, 2, "train", file, "--folder", tmp_path / "run", log=log))
    until(lambda: steps(tmp_path / "run") > 3, 200)
    for process in [each for task in started for each in below(task.pid)]:
        os.kill(process, number)
    codes = [process.wait(60) for process in started]
    assert codes[0] == 130, (tmp_path / "task0.log").read_text()
    (end,) = events(tmp_path / "run", "end")
    assert end["reason"] == "interrupted"
    assert states(tmp_path / "run", end["step"])["run"]["step"] == end["step"]


def test_a_folder_that_is_not_shared_is_told(text: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]]):
    file = settings_file(text, tmp_path, parallel={"workers": 0, "timeout": 1})
    started.append(srun(1, 2, "train", file, "--folder", tmp_path / "elsewhere", log=tmp_path / "log"))
    assert started[0].wait(60) == 2
    assert "has to be on a file system that all workers share" in (tmp_path / "log").read_text()
