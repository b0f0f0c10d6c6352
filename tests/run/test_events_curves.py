"""Curves: TensorBoard as its own reader sees them, and trackers as they are called."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from resilin.run.events import Evaluated, Event, Failure, RunEnded, RunStarted, Saved, StepDone
from resilin.run.tensorboard_log import TensorBoardLog, scalars
from resilin.run.tracker_log import TrackerError, TrackerLog, tracker_log


def started(folder: Path, at: int = 0) -> RunStarted:
    return RunStarted(
        folder=str(folder), settings={"seed": 1, "optimizer": {"lr": 0.1}}, parameters=3, device="cpu", start_step=at,
        total_steps=9, time=100.0,
    )  # fmt: skip


def step(number: int, **changed: Any) -> StepDone:
    values = {
        "step": number,
        "loss": 2.0 / number,
        "lr": 0.1,
        "grad_norm": 3.0,
        "units": 8,
        "seconds": 0.5,
        "mfu": 0.25,
    }
    return StepDone(**{**values, "logs": {"accuracy": 0.5}, "time": 100.0 + number, **changed})


def evaluated(number: int) -> Evaluated:
    return Evaluated(step=number, name="validation", metrics={"loss": 1.5}, time=200.0 + number)


def curves(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_a_step_becomes_one_point_on_every_curve() -> None:
    assert scalars(step(4)) == {
        "train/loss": 0.5,
        "train/lr": 0.1,
        "train/grad_norm": 3.0,
        "train/accuracy": 0.5,
        "speed/units_per_second": 16.0,
        "speed/seconds_per_step": 0.5,
        "speed/mfu": 0.25,
    }
    assert "speed/mfu" not in scalars(step(4, mfu=None))
    assert scalars(evaluated(3)) == {"validation/loss": 1.5}
    assert scalars(Saved(step=1, path="", bytes=1, seconds=1.0)) == {}


def test_tensorboard_shows_curves_settings_and_failures(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path) as log:
        for event in (
            started(tmp_path), step(1), step(2), evaluated(2),
            Failure(step=2, kind="non_finite", message="the loss of step 2"),
            RunEnded(step=2, reason="failed", seconds=1.0),
        ):  # fmt: skip
            log(event)
    seen = curves(tmp_path)
    assert set(seen.Tags()["scalars"]) == {*scalars(step(1)), "validation/loss"}
    assert [(e.step, e.value, e.wall_time) for e in seen.Scalars("train/loss")] == [(1, 2.0, 101.0), (2, 1.0, 102.0)]
    (settings,) = seen.Tensors("settings/text_summary")
    assert '"lr": 0.1' in settings.tensor_proto.string_val[0].decode()
    (failure,) = seen.Tensors("failures/text_summary")
    assert failure.tensor_proto.string_val[0] == b"the loss of step 2"


def test_tensorboard_hides_the_points_that_a_resume_took_back(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path) as log:
        for number in range(1, 6):
            log(step(number))
    with TensorBoardLog(tmp_path, purge_step=3) as log:
        log(started(tmp_path, 3))
        log(step(4, loss=9.0))
    assert [(e.step, e.value) for e in curves(tmp_path).Scalars("train/loss")] == [
        (1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3)), (4, 9.0),
    ]  # fmt: skip


def test_what_was_seen_before_a_kill_is_in_the_files(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path)
    log(step(1))
    log(evaluated(1))  # flushes
    assert curves(tmp_path).Scalars("validation/loss")[0].value == 1.5
    log.close()


def test_values_that_are_not_finite_do_not_stop_the_curves(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path) as log:
        log(step(1, loss=math.nan))
        log(step(2))
    first, second = curves(tmp_path).Scalars("train/loss")
    assert math.isnan(first.value)
    assert second.value == 1.0


# -- trackers ---------------------------------------------------------------------------------------------------


class FakeWandb(ModuleType):
    """The calls of wandb that are used, recorded."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> Any:
        self.calls.append(("init", options))
        return SimpleNamespace(
            id=options["id"] or "fresh7",
            summary={},
            define_metric=lambda name, step_metric: self.calls.append(("define_metric", (name, step_metric))),
            log=lambda values: self.calls.append(("log", values)),
            finish=lambda exit_code: self.calls.append(("finish", exit_code)),
        )


class FakeMlflow(ModuleType):
    """The calls of mlflow that are used, recorded."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple[str, Any]] = []

    def start_run(self, run_id: str | None, run_name: str) -> Any:
        self.calls.append(("start_run", (run_id, run_name)))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "fresh7"))

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append((name, (*args, *options.values())))


def tell(tracker: Any, *events: Event) -> None:
    for event in events:
        tracker(event)
    tracker.close()
    tracker.close()


def test_wandb_goes_on_in_the_run_that_the_folder_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    ended = RunEnded(step=2, reason="completed", seconds=1.0)
    tell(tracker_log("wandb", project="p", name="n"), started(tmp_path), step(1), evaluated(1), ended)
    tell(tracker_log("wandb", project="p", name="n"), started(tmp_path, at=1), step(2), ended)
    tell(tracker_log("wandb", project="p", name="n"), started(tmp_path, at=0))
    config = {"seed": 1, "optimizer": {"lr": 0.1}}
    inits = [options for name, options in fake.calls if name == "init"]
    assert inits == [
        {"project": "p", "name": "n", "id": None, "resume": None, "config": config},
        {"project": "p", "name": "n", "id": "fresh7", "resume": "allow", "config": config},
        {"project": "p", "name": "n", "id": None, "resume": None, "config": config},
    ]
    assert fake.calls[1:5] == [
        ("define_metric", ("*", "step")),
        ("log", {**scalars(step(1)), "step": 1}),
        ("log", {"validation/loss": 1.5, "step": 1}),
        ("finish", 0),
    ]
    assert fake.calls[-1] == ("finish", 1)  # it never said that it ended


def test_mlflow_gets_finite_metrics_settings_and_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    ended = RunEnded(step=2, reason="interrupted", seconds=1.0)
    tell(tracker_log("mlflow", project="p", name="n"), started(tmp_path), step(1, loss=math.nan), ended)
    tell(tracker_log("mlflow", project="p", name="n"), started(tmp_path, at=1), step(2))
    finite = {key: value for key, value in scalars(step(1)).items() if key != "train/loss"}
    assert fake.calls == [
        ("set_experiment", ("p",)),
        ("start_run", (None, "n")),
        ("log_dict", ({"seed": 1, "optimizer": {"lr": 0.1}}, "settings.json")),
        ("set_tags", ({"seed": "1", "optimizer.lr": "0.1"},)),
        ("log_metrics", (finite, 1)),
        ("end_run", ("KILLED",)),
        ("set_experiment", ("p",)),
        ("start_run", ("fresh7", "n")),
        ("log_dict", ({"seed": 1, "optimizer": {"lr": 0.1}}, "settings.json")),
        ("set_tags", ({"seed": "1", "optimizer.lr": "0.1"},)),
        ("log_metrics", (scalars(step(2)), 2)),
        ("end_run", ("FAILED",)),  # it never said that it ended
    ]


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_before_training(
    tracker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(
        TrackerError, match=rf"log.tracker = '{tracker}'.*pip install 'resilin\[{tracker}\]'.*tracker=none"
    ):
        tracker_log(tracker, project="p", name="n")


def test_a_damaged_memory_of_the_tracker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    (tmp_path / "tracker.json").write_text("{")
    with pytest.raises(TrackerError, match=r"tracker.json: is damaged; remove it"):
        tracker_log("wandb", project="p", name="n")(started(tmp_path, at=1))
    (tmp_path / "tracker.json").write_text(json.dumps({"mlflow": "other"}))
    tracker_log("wandb", project="p", name="n")(started(tmp_path, at=1))  # another tracker's: a new run


class Broken:
    """A tracker whose server is gone."""

    def __init__(self, from_the_start: bool) -> None:
        self.from_the_start = from_the_start

    def start(self, event: RunStarted, identity: str | None) -> str:
        if self.from_the_start:
            raise ConnectionError("no route")
        return "x"

    def log(self, values: Any, step: int) -> None:
        raise ConnectionError("no route")

    def note(self, key: str, text: str) -> None:
        raise ConnectionError("no route")

    def end(self, reason: str) -> None:
        raise ConnectionError("no route")


def test_a_tracker_that_fails_at_the_start_is_an_error_and_later_a_warning(tmp_path: Path) -> None:
    with pytest.raises(TrackerError, match=r"wandb cannot be started: no route; .*log.tracker=none"):
        TrackerLog("wandb", Broken(True))(started(tmp_path))
    log = TrackerLog("wandb", Broken(False))
    log(started(tmp_path))
    with pytest.warns(UserWarning, match="wandb does not take what is sent, training goes on: no route") as warned:
        tell(log, step(1), step(2), Failure(step=2, kind="save", message="m"))
    assert len(warned) == 1
