"""Clocks that are decided on when stages lose members, and handed to the user's function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from elastic_runs import settings_of, text_at

from resilin.cluster.axes import Clocks
from resilin.cluster.changes import changed
from resilin.cluster.clock_setter import ClockSetter
from resilin.cluster.division import Division
from resilin.cluster.protocol.coordinator import Coordinator
from resilin.cluster.protocol.effects import Effect, Note, SetClocks
from resilin.cluster.protocol.messages import Committed, Halted, Hello, Message, Ready, Warm
from resilin.cluster.protocol.rules import Rules
from resilin.cluster.view import View
from resilin.config import SettingsError, UserError
from resilin.run.elastic_start import launch

CLOCKS = Clocks((1.0, 1.25, 1.5, 2.0), 1.0)
COSTS = (1.0, 1.0, 1.0, 1.0, 0.0)


class Job:
    """A coordinator of two stages with two members each, who do what they are told."""

    def __init__(self, clocks: Clocks | None = CLOCKS) -> None:
        self.coordinator = Coordinator(Rules(members=4, stages=2, layers=(2, 2), micros=8, clocks=clocks))
        self.effects: list[Effect] = []
        for number in range(4):
            self.say(number, Hello("here"))
            self.say(number, Warm(COSTS))
        self.all_ready()

    def say(self, number: int, message: Message) -> None:
        self.effects += self.coordinator.told(number, message, 0.0)

    def all_ready(self) -> None:
        view = self.coordinator._next
        assert view is not None
        for number in view.members:
            self.say(number, Ready(view.epoch, view.digest, f"stage {view.stage_of(number)}"))

    @property
    def view(self) -> View:
        assert self.coordinator.view is not None
        return self.coordinator.view

    def set_clocks(self) -> list[list[float]]:
        """That were handed over since this was last asked."""
        self.effects += self.coordinator._effects()
        found = [[one["clock"] for one in e.stages] for e in self.effects if isinstance(e, SetClocks)]
        self.notes = [e.facts for e in self.effects if isinstance(e, Note) and e.what == "clocks"]
        self.effects.clear()
        return found

    def lose(self, number: int) -> None:
        epoch = self.view.epoch
        self.say(self.view.members[0], Committed(epoch, self.coordinator.version + 1))
        self.effects += self.coordinator.gone(number, "was killed", 0.0)
        version = self.coordinator.version
        copies = tuple((owner, epoch, (version,)) for owner in range(4))
        for other in list(self.coordinator.members):
            self.say(other, Halted(epoch, "lost", version, version, copies, ()))
        self.all_ready()


def test_the_stage_that_lost_a_member_is_told_a_higher_clock_once_and_the_usual_one_later():
    job = Job()
    assert job.set_clocks() == []
    job.lose(2)
    assert [len(stage.members) for stage in job.view.stages] == [2, 1]
    assert job.set_clocks() == [[1.0, 2.0]]
    (note,) = job.notes
    assert note["seconds"]["after"] < note["seconds"]["before"] == pytest.approx(1.0)
    assert "higher at stage 1" in note["why"]
    job.effects += job.coordinator.dividing.clocks(job.view)  # nothing new
    assert job.set_clocks() == []
    job.effects += job.coordinator.dividing.clocks(changed(job.view, gone=[0]))  # both stages have one
    assert job.set_clocks() == [[1.0, 1.0]]


def test_without_clocks_to_set_nothing_is_said():
    job = Job(None)
    job.lose(2)
    assert job.set_clocks() == []
    assert Division(COSTS, micros=8).frequency(job.view) is None
    assert Division(COSTS, micros=1, clocks=CLOCKS).frequency(job.view) is None  # more members than micro-batches


def test_a_function_that_fails_is_told_of_and_in_the_end_the_usual_clocks_are_handed_over():
    seen: list[float] = []
    notes: list[str] = []

    def hook(stages: Sequence[Mapping[str, Any]]) -> None:
        seen.append(stages[0]["clock"])
        if seen == [2.0]:
            raise PermissionError("only root may set clocks")

    setter = ClockSetter(hook, lambda what, facts: notes.append(f"{what}: {facts['why']}"))
    setter.set([{"stage": 0, "members": [1], "clock": 2.0, "usual": 1.0}])
    setter.close()
    assert (seen, notes) == ([2.0, 1.0], ["clocks_failed: PermissionError: only root may set clocks"])


def test_where_the_usual_clock_is_set_nothing_more_is_handed_over():
    seen: list[float] = []
    setter = ClockSetter(lambda stages: seen.append(stages[0]["clock"]), lambda what, facts: None)
    setter.set([{"stage": 0, "members": [1], "clock": 1.0, "usual": 1.0}])
    setter.close()
    assert seen == [1.0]


def test_settings_that_make_no_sense_are_refused(tmp_path: Path):
    text = text_at(tmp_path)
    with pytest.raises(SettingsError, match="no clocks to hand over"):
        settings_of(text, cluster={"clocks_hook": "json:dumps"})
    with pytest.raises(SettingsError, match="greater than 0"):
        settings_of(text, cluster={"clocks": (1.0, 0.0)})
    for path, why in (
        ("nowhere_at_all:set", "No module named"),
        ("json:sets", "no attribute"),
        ("json", "module:func"),
    ):
        settings = settings_of(text, cluster={"clocks": (1.0, 1.5), "clocks_hook": path})
        with pytest.raises(UserError, match=why):
            launch(settings, tmp_path / "run", ["true"])
