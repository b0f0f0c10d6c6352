"""Runs on several machines that join a coordinator, here several addresses of the loopback, beside one process."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from elastic_checks import changes, check_same, equal, events, states
from elastic_runs import STEPS, settings_of
from keepers import resilin, until

from resilin.cluster.elastic_job import ElasticJob, JobEnded
from resilin.cluster.hosts import Hosts
from resilin.cluster.local import worker_command
from resilin.cluster.place import FILE, Place
from resilin.config import settings_to_toml
from resilin.run.elastic_start import launch
from resilin.run.events import Cluster, Event, StepDone
from resilin.run.settings import RunSettings

Joins = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def joins(tmp_path: Path) -> Iterator[Joins]:
    """Lets a machine join the run in `tmp_path/run`: its number is the last one of its address."""
    started = []

    def join(number: int, workers: int, *more: object) -> subprocess.Popen[bytes]:
        process = resilin(
            "cluster", "join", tmp_path / "run", "--workers", workers, "--address", f"127.0.0.{number}",
            "--name", f"host{number}", *more, log=tmp_path / f"host{number}.log",
        )  # fmt: skip
        started.append(process)
        return process

    yield join
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def serve(settings: RunSettings, folder: Path, **more: Any) -> JobEnded:
    silence = settings.cluster.silence
    return launch(
        settings, folder, worker_command(), starter=lambda at: Hosts(str(at.resolve()), silence),
        place=Place("127.0.0.1"), **more,
    )  # fmt: skip


def members_of(event: Event) -> list[int]:
    return event.facts["members"] if isinstance(event, Cluster) and event.what == "change" else []


def test_a_machine_is_lost_another_joins_and_one_is_let_go(text: Path, undisturbed: Path, tmp_path: Path, joins: Joins):
    """Copies lie on other machines, so all workers of one may be lost at once."""
    hosts = {number: joins(number, 2) for number in (2, 3)}
    held: list[int] = []
    happened: list[str] = []

    def hold(job: ElasticJob) -> None:
        """So that the run has not ended before the newcomer is ready."""
        held.append(job.training()[0])
        job.signal(held[0], signal.SIGSTOP)

    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            hosts[2].kill()  # and with it its workers
        if len(members_of(event)) == 2 and not happened:
            happened.append("lost")
            hosts[4] = joins(4, 1)
        if isinstance(event, StepDone) and happened == ["lost"] and not held:
            hold(job)
        if isinstance(event, Cluster) and event.what == "ready":
            job.signal(held[0], signal.SIGCONT)
        if len(members_of(event)) == 3:
            happened.append("joined")
            hosts[4].terminate()  # its machine will be taken away

    settings = settings_of(text, parallel={"workers": 4}, cluster={"silence": 60})
    assert serve(settings, tmp_path / "run", watch=watch) == JobEnded(0, "")
    check_same(tmp_path / "run", undisturbed)
    assert happened[:2] == ["lost", "joined"]
    told = events(tmp_path / "run", "cluster")
    lost = [event["facts"] for event in told if event["what"] == "lost"]
    assert len(lost) == 2
    assert len([change for change in changes(tmp_path / "run") if len(change["members"]) == 2]) >= 1
    assert hosts[3].wait(60) == 0
    assert hosts[4].wait(60) == 0
    assert [event["facts"]["host"] for event in told if event["what"] == "joined"] in (
        ["host2", "host3", "host4"], ["host3", "host2", "host4"],
    )  # fmt: skip


@pytest.mark.slow
def test_a_coordinator_that_is_lost_ends_everybody_and_resume_goes_on(
    text: Path, undisturbed: Path, tmp_path: Path, joins: Joins
):
    settings = settings_of(text, parallel={"workers": 2}, log={"live": False, "tensorboard": False})
    (tmp_path / "run.toml").write_text(settings_to_toml(settings))
    command = ("cluster", "serve", tmp_path / "run.toml", "--folder", tmp_path / "run", "--port", 0)
    coordinator = resilin(*command, log=tmp_path / "serve.log")
    hosts = [joins(number, 1) for number in (2, 3)]
    until(lambda: (tmp_path / "run" / "checkpoints" / "step-00000004").exists() or any_step(tmp_path, 5))
    coordinator.kill()
    coordinator.wait()
    assert [host.wait(60) for host in hosts] == [1, 1]
    assert "the coordinator is gone, and with it the run" in (tmp_path / "host2.log").read_text()
    assert (tmp_path / "run" / "workers" / FILE).exists()  # it had no time to remove it
    again = resilin(*command, "--resume", log=tmp_path / "serve.log")
    hosts = [joins(number, 1) for number in (3, 4)]
    assert again.wait(120) == 0, (tmp_path / "serve.log").read_text()
    assert [host.wait(60) for host in hosts] == [0, 0]
    assert equal(states(tmp_path / "run", STEPS)["model"], states(undisturbed, STEPS)["model"])


def any_step(folder: Path, step: int) -> bool:
    log = folder / "run" / "events.jsonl"
    return log.exists() and any(
        told["event"] == "step" and told["step"] >= step for told in map(json.loads, log.read_text().splitlines())
    )


def test_when_all_are_told_to_leave_the_run_is_saved(text: Path, undisturbed: Path, tmp_path: Path, joins: Joins):
    hosts = [joins(number, 1) for number in (2, 3)]

    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            for host in hosts:
                host.terminate()

    settings = settings_of(text, parallel={"workers": 2}, train={"steps": 400}, evaluation={"every": 0})
    assert serve(settings, tmp_path / "run", watch=watch) == JobEnded(130, "")
    (end,) = events(tmp_path / "run", "end")
    assert end["reason"] == "interrupted"
    (saved,) = (path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if str(end["step"]) in path.name)
    assert saved
    done = [event["loss"] for event in events(tmp_path / "run", "step")]
    assert len(done) == end["step"]


def test_a_machine_that_others_cannot_reach_or_that_does_not_know_the_secret_is_refused(
    text: Path, tmp_path: Path, joins: Joins
):
    wrong: list[subprocess.Popen[bytes]] = []
    (tmp_path / "secret").write_text("not the secret of this job")
    (tmp_path / "secret").chmod(0o600)

    def watch(job: ElasticJob, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            job.signal(0, signal.SIGSTOP)  # so that the run is not over before
            told = json.loads((tmp_path / "run" / "workers" / FILE).read_text())
            at = f"127.0.0.1:{told['port']}"
            wrong.append(joins(9, 1, "--address", "192.0.2.7"))
            wrong.append(
                resilin(
                    "cluster",
                    "join",
                    at,
                    "--secret-file",
                    tmp_path / "secret",
                    log=tmp_path / "stranger.log",
                )
            )
            assert [process.wait(60) for process in wrong] == [2, 2]
            job.signal(0, signal.SIGCONT)

    hosts = [joins(2, 1)]
    assert serve(
        settings_of(text, parallel={"workers": 1}, cluster={"silence": 80}), tmp_path / "run", watch=watch
    ) == JobEnded(0, "")
    assert hosts[0].wait(60) == 0
    assert "cannot reach each other" in (tmp_path / "host9.log").read_text()
    assert "is the secret the same at both ends?" in (tmp_path / "stranger.log").read_text()
