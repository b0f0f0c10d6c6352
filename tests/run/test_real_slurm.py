"""Runs under a real Slurm, which this file starts for itself: tasks, workers and nodes as Slurm has them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from elastic_checks import changes, check_same, events, states
from elastic_runs import check_met, settings_of
from keepers import environment_of, until
from throwaway_slurm import slurm, why_not

from resilin.cluster.faults import Fault, to_environment
from resilin.cluster.place import FILE, ask, found
from resilin.config import settings_to_toml

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is a Slurm")]

Srun = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """By which commands find the Slurm of this file."""
    with slurm(tmp_path_factory.mktemp("slurm")) as found_by:
        yield found_by


@pytest.fixture
def srun(text: Path, tmp_path: Path, variables: dict[str, str]) -> Iterator[Srun]:
    """Train with `srun` and some options, in the folder `run`; what it writes is in `log`."""
    file, started = tmp_path / "run.toml", []

    def start(options: str, *arguments: str, elastic: bool = True, **more: str) -> subprocess.Popen[bytes]:
        cluster = {"elastic": elastic, "silence": 60}
        file.write_text(settings_to_toml(settings_of(text, parallel={"workers": 0}, cluster=cluster)))
        command = [
            "srun", *options.split(), sys.executable, "-m", "resilin", "train", str(file), "--folder",
            str(tmp_path / "run"), *arguments,
        ]  # fmt: skip
        with (tmp_path / "log").open("wb") as log:
            started.append(subprocess.Popen(command, env=environment_of({**variables, **more}), stdout=log, stderr=log))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # it ends its step; killed, it would leave it
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def told(folder: Path, what: str) -> list[dict[str, Any]]:
    return [one["facts"] for one in events(folder, "cluster") if one["what"] == what]


def steps(folder: Path) -> int:
    return len(events(folder, "step")) if (folder / "events.jsonl").exists() else 0


def workers_of(folder: Path) -> dict[int, int]:
    """The process of each worker."""
    status = ask(found(folder / "workers"), {"command": "status"})
    return {one["number"]: int(one["process"]) for one in status["members"]}


def task_of(process: int) -> int:
    """Slurm's task that a worker is in: what the daemon of the step has started."""
    while True:
        above = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
        if Path(f"/proc/{above}/comm").read_text().startswith("slurmstepd"):
            return process
        process = above


def stopped(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def test_a_worker_and_a_whole_task_are_killed_and_the_others_go_on(srun: Srun, undisturbed: Path, tmp_path: Path):
    folder = tmp_path / "run"
    holds = [Fault(0, 4, "adding gradients up", "stop"), Fault(1, 8, "adding gradients up", "stop")]
    options = "--nodes 2 --ntasks 4 --no-kill --kill-on-bad-exit=0 --wait=0"
    # Nobody knows these nodes by the names that they have here.
    job = srun(options, "--resume", MASTER_ADDR="127.0.0.1", **to_environment(holds))
    until(lambda: steps(folder) > 2)
    workers = workers_of(folder)
    until(lambda: stopped(workers[0]))
    os.kill(workers[0], signal.SIGKILL)
    until(lambda: stopped(workers[1]))
    first = json.loads((folder / "workers" / FILE).read_text())["process"]
    tasks = {number: task_of(workers[number]) for number in (1, 2, 3)}
    lost = next(number for number in (2, 3) if tasks[number] != first)
    os.kill(tasks[lost], signal.SIGKILL)
    until(lambda: lost in [one["member"] for one in told(folder, "lost")])
    os.kill(workers[1], signal.SIGCONT)
    # srun tells of the task that was killed, however well the run has ended.
    assert job.wait(200) == 128 + signal.SIGKILL, (tmp_path / "log").read_text()
    assert "run completed" in (tmp_path / "log").read_text()
    check_met(folder, holds)
    check_same(folder, undisturbed)
    assert [len(change["members"]) for change in changes(folder)] == [4, 3, 2]


def test_a_notice_to_all_processes_of_a_job_saves_and_another_job_goes_on(
    srun: Srun, variables: dict[str, str], undisturbed: Path, tmp_path: Path
):
    folder, hold = tmp_path / "run", [Fault(0, 6, "adding gradients up", "stop")]
    options = "--nodes 1 --no-kill --kill-on-bad-exit=0 --wait=0"
    job = srun(f"--job-name noticed --ntasks 3 {options}", "--resume", **to_environment(hold))
    until(lambda: steps(folder) > 2)
    held = workers_of(folder)[0]
    until(lambda: stopped(held))
    subprocess.run(["scancel", "--signal=USR1", "--name=noticed"], env=environment_of(variables), check=True)
    until(lambda: len(told(folder, "leaving")) == 2)
    os.kill(held, signal.SIGCONT)
    assert job.wait(200) == 130, (tmp_path / "log").read_text()
    (end,) = events(folder, "end")
    assert end["reason"] == "interrupted"
    assert states(folder, end["step"])["run"]["step"] == end["step"]
    assert srun(f"--ntasks 2 {options}", "--resume").wait(200) == 0, (tmp_path / "log").read_text()
    check_same(folder, undisturbed)


def test_tasks_that_are_bound_to_no_cores_share_those_of_their_job(srun: Srun, undisturbed: Path, tmp_path: Path):
    options = "--nodes 2 --ntasks 4 --ntasks-per-node 2 --cpus-per-task 1"
    job = srun(options, "train.threads=0", elastic=False, MASTER_ADDR="127.0.0.1")
    assert job.wait(200) == 0, (tmp_path / "log").read_text()
    (start,) = events(tmp_path / "run", "start")
    assert start["device"].startswith("cpu, 1 thread")
    check_same(tmp_path / "run", undisturbed)


def test_a_node_by_a_name_that_nobody_knows_is_told(srun: Srun, tmp_path: Path):
    assert srun("--nodes 2 --ntasks 2", elastic=False).wait(200) == 2
    assert "set MASTER_ADDR to a name or an address by which all nodes reach it" in (tmp_path / "log").read_text()
