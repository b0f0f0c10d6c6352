"""`resilin train --workers N` and starts by others: how jobs of real processes end, whatever happens to a worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from ports import free_port

FAULTY = '''
"""Text that one worker cannot read."""

import os
import signal
import time

from resilin.config import UserError
from resilin.data.text_source import TextSource


class Faulty(TextSource):
    how: str = ""
    rank: int = 1

    def build(self, context):
        source = super().build(context)
        if os.environ.get("RANK") != str(self.rank) or context.split != "train":
            return source
        how = self.how

        class Broken(type(source)):
            def fetch(self, step, slots):
                if step == 2:
                    if how == "bug":
                        raise KeyError("a row that is not there")
                    if how == "mistake":
                        raise UserError("row 7 has no text: mend it")
                    if how == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(300)
                return super().fetch(step, slots)

        source.__class__ = Broken
        return source
'''


@pytest.fixture(scope="module")
def place(workplace: Path) -> Path:
    (workplace / "faulty.py").write_text(FAULTY, encoding="utf-8")
    return workplace


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "resilin", "train", "run.toml", "log.live=false", *arguments]


def start(place: Path, environment: Mapping[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), cwd=place, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(place: Path, environment: Mapping[str, str], *arguments: str) -> tuple[int, str]:
    process = start(place, environment, *arguments)
    out, err = process.communicate(timeout=200)
    return process.returncode, out + err


def until(happens: Callable[[], object], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def steps_done(folder: Path) -> int:
    events = folder / "events.jsonl"
    return events.read_text(encoding="utf-8").count('{"event":"step"') if events.exists() else 0


# -- failures ----------------------------------------------------------------------------------------------------


def test_a_bug_in_a_worker_ends_the_job_with_its_traceback(place: Path, environment: dict[str, str]):
    code, told = run(
        place, environment, "--workers", "2", "--folder", "runs/bug", "source.use=faulty:Faulty", "source.how=bug"
    )
    assert code == 1
    error = told[told.index("error:") :]
    assert error.startswith("error: worker 1 (data 1) failed:\nTraceback")
    assert "KeyError: 'a row that is not there'" in error
    assert "Connection closed" not in told


def test_a_mistake_of_the_user_is_told_without_a_traceback(place: Path, environment: dict[str, str]):
    folder = "runs/mistake"
    code, told = run(
        place, environment, "--workers", "2", "--folder", folder, "source.use=faulty:Faulty", "source.how=mistake",
        "parallel.tensor=2",
    )  # fmt: skip
    assert code == 2
    assert "error: worker 1 (tensor 1) failed:\nrow 7 has no text: mend it" in told
    assert "Traceback" not in told


def test_a_killed_worker_is_named_with_its_log(place: Path, environment: dict[str, str]):
    folder = "runs/killed"
    code, told = run(
        place, environment, "--workers", "2", "--folder", folder, "source.use=faulty:Faulty", "source.how=killed"
    )
    assert code == 1
    assert "worker 1 (data 1) was killed (SIGKILL" in told
    assert f"{folder}/workers/worker-1.log" in told
    assert "Traceback" not in told


def test_a_worker_that_hangs_ends_the_job_with_who_waited_for_whom(place: Path, environment: dict[str, str]):
    code, told = run(
        place, environment, "--workers", "2", "--folder", "runs/hangs", "source.use=faulty:Faulty", "source.how=hangs",
        "parallel.pipeline=2", "model.layers=2", "train.micro_batch_size=2", "parallel.timeout=5",
    )  # fmt: skip
    assert code == 1
    assert "worker 0 (pipeline stage 0) waited for 5 s (parallel.timeout) for worker 1 in step 2" in told
    assert "worker 1 (pipeline stage 1) waits for none, and 1 wait for it" in told
    assert "faulty.py:" in told  # where it sleeps
    rows = told[told.index("who waits for whom:") :].splitlines()
    assert [row.split()[0] for row in rows[1:4]] == ["worker", "0", "1"]


def test_a_loss_that_is_not_finite_ends_with_3(place: Path, environment: dict[str, str]):
    code, told = run(
        place, environment, "--workers", "2", "--folder", "runs/nan", "optimizer.lr=1e30", "train.clip_norm=0",
        "optimizer.schedule.warmup=0",
    )  # fmt: skip
    assert code == 3, told
    assert "is not finite" in told


# -- interrupts and orphans --------------------------------------------------------------------------------------


def test_an_interrupted_job_saves_together_and_goes_on(place: Path, environment: dict[str, str]):
    arguments = "--workers", "2", "--folder", "runs/stopped", "train.steps=4000", "evaluation.every=0"
    process = start(place, environment, *arguments)
    until(lambda: steps_done(place / "runs/stopped") > 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130, out + err
    done = steps_done(place / "runs/stopped")
    assert (place / "runs/stopped/checkpoints" / f"step-{done:08d}").is_dir()
    assert "Traceback" not in out + err


def test_workers_end_when_their_launcher_is_killed(place: Path, environment: dict[str, str]):
    folder = place / "runs/orphans"
    process = start(place, environment, "--workers", "2", "--folder", str(folder), "train.steps=100000")
    until(lambda: steps_done(folder) > 0)
    children = children_of(process.pid)
    started = [*children, *(pid for child in children for pid in children_of(child))]
    assert len(started) == 3  # two workers, and the process that they were forked from
    process.kill()
    process.communicate()
    until(lambda: not any(_runs(pid) for pid in started))
    done = steps_done(folder)
    assert (folder / "checkpoints" / f"step-{done:08d}").is_dir()  # they finished the step and saved


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(place: Path, environment: dict[str, str]):
    process = start(
        place, environment, "--workers", "2", "--folder", "runs/twice", "source.use=faulty:Faulty", "source.how=hangs"
    )
    until(lambda: steps_done(place / "runs/twice") == 2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None  # it waits for the step, which never ends
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130, out + err


# -- starts by hand, by torchrun and by Slurm ---------------------------------------------------------------------


def by_hand(place: Path, environment: Mapping[str, str], *each: tuple[str, ...]) -> list[tuple[int, str]]:
    port = free_port()
    placed = [
        {**environment, "RANK": str(rank), "WORLD_SIZE": str(len(each)), "MASTER_ADDR": "127.0.0.1",
         "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(len(each))}
        for rank in range(len(each))
    ]  # fmt: skip
    processes = [start(place, variables, *arguments) for variables, arguments in zip(placed, each, strict=True)]
    return [(p.returncode, out + err) for p in processes for out, err in [p.communicate(timeout=200)]]


def test_workers_with_different_settings_refuse_to_start(place: Path, environment: dict[str, str]):
    ends = by_hand(place, environment, ("--folder", "runs/mixed"), ("--folder", "runs/mixed", "optimizer.lr=0.5"))
    for code, told in ends:
        assert code == 2
        assert "different settings: optimizer.lr is 0.01 at worker 0 and 0.5 at worker 1" in told
        assert "Traceback" not in told


@pytest.mark.slow
def test_workers_with_different_data_refuse_to_start(place: Path, environment: dict[str, str]):
    elsewhere = place / "elsewhere"
    (elsewhere / "text").mkdir(parents=True)
    for name in ("this.py", "textwrap.py", "string.py", "heapq.py"):
        (elsewhere / "text" / f"{name}.txt").write_text(f"other text than {name} " * 500, encoding="utf-8")
    (elsewhere / "run.toml").write_bytes((place / "run.toml").read_bytes())
    port, processes = free_port(), []
    for rank, folder in enumerate((place, elsewhere)):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        processes.append(start(folder, {**environment, **variables}, "--folder", str(place / "runs/two-texts")))
    ends = [(p.communicate(timeout=200), p.returncode) for p in processes]
    for (out, err), code in ends:
        assert code == 2, out + err
        assert "the workers have different data" in err


@pytest.mark.slow
def test_srun_starts_workers(place: Path, environment: dict[str, str]):
    job, processes = str(free_port()), []  # its number decides on the port
    for rank in range(2):
        variables = {
            "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2",
            "SLURM_LOCALID": str(rank), "SLURM_NNODES": "1", "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_TASKS_PER_NODE": "2",
        }  # fmt: skip
        processes.append(start(place, {**environment, **variables}, "--folder", "runs/slurm", "parallel.tensor=2"))
    ends = [(p.communicate(timeout=200), p.returncode) for p in processes]
    assert [code for _, code in ends] == [0, 0], ends
    assert (place / "runs/slurm/checkpoints/step-00000006").is_dir()


@pytest.mark.slow
def test_torchrun_starts_workers(place: Path, environment: dict[str, str]):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
         *command("--folder", "runs/torchrun", "parallel.tensor=2")[1:]],
        cwd=place, env=environment, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (place / "runs/torchrun/checkpoints/step-00000006").is_dir()


@pytest.mark.slow
def test_two_jobs_at_once_do_not_meet(place: Path, environment: dict[str, str]):
    jobs = [start(place, environment, "--workers", "2", "--folder", f"runs/job-{n}") for n in range(2)]
    assert [job.wait(200) for job in jobs] == [0, 0]


# -- refused before anything starts -------------------------------------------------------------------------------


def test_degrees_that_do_not_fit_are_told_before_anything_starts(resilin):
    done = resilin("train", "run.toml", "--workers", "6", "parallel.tensor=4", "--folder", "runs/never")
    assert done.returncode == 2
    assert "6 workers cannot be divided so: tensor 4 = 4, which does not divide 6" in done.stderr
    assert "parallel.tensor=3" in done.stderr


def test_a_worker_does_not_start_workers(resilin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = resilin("train", "run.toml", "--workers", "2", "--folder", "runs/never")
    assert done.returncode == 2
    assert "this process is worker 0 of 2 already" in done.stderr


def test_a_number_of_workers_that_the_degrees_do_not_give_is_refused(resilin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = resilin("train", "run.toml", "parallel.tensor=2", "--folder", "runs/never")
    assert done.returncode == 2
    assert "3 workers cannot be divided so" in done.stderr
    assert os.environ["WORLD_SIZE"] == "3"


def test_who_does_what_is_told_before_anything_starts(resilin):
    done = resilin("inspect", "run.toml", "--workers", "4", "parallel.pipeline=2", "model.layers=2",
                   "train.micro_batch_size=1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 workers (pipeline=2 data=2): who does what" in done.stdout
    table = done.stdout[done.stdout.index("who does what") :].splitlines()
    assert [row.split()[:4] for row in table[2:6]] == [
        ["0", "0", "0", "0"], ["1", "0", "1", "0"], ["2", "1", "0", "1"], ["3", "1", "1", "1"]
    ]  # fmt: skip
    assert "pipeline bubble" in done.stdout
    done = resilin("inspect", "run.toml", "--workers", "6", "parallel.tensor=4")
    assert done.returncode == 2
    assert "use parallel.tensor=3, or 4 workers, or 8 workers" in done.stderr
