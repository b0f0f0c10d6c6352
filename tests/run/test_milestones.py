"""A noun may ask for evaluations and checkpoints of its own; parts hear of each evaluation just before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from resilin.nouns import StepView
from resilin.run.events import Evaluated, Event, Saved
from resilin.run.run import Run


class Listening(nn.Module):
    """A sub-module that notes the steps at which it is told of an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[int] = []

    def before_evaluation(self, view: StepView) -> None:
        self.told.append(view.step)


def run_with(tiny_run: Callable[..., Run], counting: type[Any], folder: Path, every: int) -> tuple[list[Event], Run]:
    class Asking(counting):  # type: ignore[misc]
        def milestone(self, step: int) -> bool:
            return step in (2, 3)

    events: list[Event] = []
    run = tiny_run(folder, source=Asking(), pace={"steps": 8, "evaluate_every": every, "save_every": every})
    run.validation = {"validation": counting(length=1)}
    run.model.add_module("listening", Listening())
    run.listeners = (events.append,)
    run.train()
    return events, run


def test_milestones_come_besides_the_regular_moments(
    tiny_run: Callable[..., Run], counting: type[Any], tmp_path: Path
) -> None:
    events, run = run_with(tiny_run, counting, tmp_path, 5)
    assert [e.step for e in events if isinstance(e, Evaluated)] == [2, 3, 5, 8]
    assert [e.step for e in events if isinstance(e, Saved)] == [2, 3, 5, 8]
    assert run.model.listening.told == [2, 3, 5, 8]  # type: ignore[union-attr]


def test_a_run_that_neither_evaluates_nor_saves_has_no_milestones(
    tiny_run: Callable[..., Run], counting: type[Any], tmp_path: Path
) -> None:
    events, run = run_with(tiny_run, counting, tmp_path, 0)
    assert not [e for e in events if isinstance(e, Evaluated)]
    assert [e.step for e in events if isinstance(e, Saved)] == [8]
    assert run.model.listening.told == []  # type: ignore[union-attr]
