"""Runs on machines with networks of their own, whose cables are pulled: nobody is told, and silence is noticed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from elastic_checks import changes, equal, events, states
from elastic_runs import alone, settings_of, text_at
from keepers import resilin, until
from networks import Networks, permitted

from resilin.cluster.handshake import new_secret
from resilin.config import settings_to_toml

STEPS = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not permitted(), reason="networks of one's own need root on Linux"),
]


class Machines:
    """A coordinator's machine and two others, each with a network of its own."""

    def __init__(self, folder: Path) -> None:
        self.networks, self._folder = Networks(2), folder
        self._started: list[subprocess.Popen[bytes]] = []
        self._secret = folder / "secret"
        self._secret.write_text(new_secret())
        self._secret.chmod(0o600)

    def start(self, number: int, *more: object) -> subprocess.Popen[bytes]:
        """Start the coordinator (0), or two workers on another machine."""
        what: tuple[object, ...] = ("join", "10.77.0.1:29400", "--workers", "2")
        if not number:
            what = ("serve", self._folder / "run.toml", "--host", "10.77.0.1", "--folder", self._folder / "run")
        process = resilin(
            "cluster", *what, "--secret-file", self._secret, *more, log=self._folder / f"log{number}",
            inside=self.networks.inside(number),
        )  # fmt: skip
        self._started.append(process)
        return process

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.networks.close()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path)
    yield made
    made.close()


def prepared(tmp_path: Path, steps: int) -> Path:
    text = text_at(tmp_path)
    train = {"steps": steps}
    settings = settings_of(text, parallel={"workers": 4}, cluster={"silence": 4}, train=train)
    (tmp_path / "run.toml").write_text(settings_to_toml(settings))
    alone(text, tmp_path / "one", train=train)
    return tmp_path / "run"


def steps(folder: Path) -> int:
    return len(events(folder, "step")) if (folder / "events.jsonl").exists() else 0


def same(folder: Path, other: Path) -> None:
    losses = [{e["step"]: (e["loss"], e["grad_norm"]) for e in events(at, "step")} for at in (folder, other)]
    assert losses[0] == losses[1]
    mine, theirs = states(folder, STEPS), states(other, STEPS)
    assert equal(mine["model"], theirs["model"])
    assert equal(mine["optimizer"]["parameters"], theirs["optimizer"]["parameters"])


def test_a_machine_whose_cable_is_pulled_is_missed_after_a_while(tmp_path: Path, machines: Machines):
    folder = prepared(tmp_path, STEPS)
    coordinator, others = machines.start(0), [machines.start(1), machines.start(2)]
    until(lambda: steps(folder) >= 3, 200)
    machines.networks.unplug(1)
    assert coordinator.wait(200) == 0, (tmp_path / "log0").read_text()
    assert others[1].wait(60) == 0
    assert others[0].wait(60) == 1  # it has nobody to ask any more
    same(folder, tmp_path / "one")
    assert [len(change["members"]) for change in changes(folder)] == [4, 2]
    hosts = sorted(e["facts"]["host"].split("(")[1] for e in events(folder, "cluster") if e["what"] == "joined")
    assert hosts == ["10.77.0.2)", "10.77.0.3)"]


def test_a_coordinator_whose_machine_is_gone_ends_all_and_the_last_checkpoint_goes_on(
    tmp_path: Path, machines: Machines
):
    folder = prepared(tmp_path, STEPS)
    coordinator, others = machines.start(0), [machines.start(1), machines.start(2)]
    until(lambda: any((folder / "checkpoints").glob("step-*")) and steps(folder) >= 6, 200)
    machines.networks.unplug(0)
    coordinator.kill()
    assert [machine.wait(60) for machine in others] == [1, 1]
    assert "the coordinator is gone" in (tmp_path / "log1").read_text()
    machines.networks.plug(0)
    coordinator, others = machines.start(0, "--resume"), [machines.start(1), machines.start(2)]
    assert coordinator.wait(200) == 0, (tmp_path / "log0").read_text()
    assert [machine.wait(60) for machine in others] == [0, 0]
    same(folder, tmp_path / "one")
