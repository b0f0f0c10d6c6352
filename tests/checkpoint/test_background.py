"""Saving in the background: training waits for a copy, and nothing that was promised is lost."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import as_ranks, outcomes

from resilin.checkpoint.background import BackgroundSaves
from resilin.checkpoint.coordinator import Threads
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.tensor_record import DTYPES
from resilin.layout import Layout, Region, rank

Make = Callable[[int], dict[str, Any]]
Same = Callable[[Any, Any], bool]


class Gate:
    """Holds back the writing, as a slow disk does, and may fail it."""

    def __init__(self, folder: CheckpointFolder) -> None:
        self.open, self.error = threading.Event(), None
        self.writing: list[int] = []
        self._real, folder.write = folder.write, self  # type: ignore[method-assign, assignment]

    def __call__(self, step: int, share: Any) -> Any:
        self.writing.append(step)
        assert self.open.wait(20)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self._real(step, share)


@pytest.fixture
def saves(folder: CheckpointFolder) -> Iterator[BackgroundSaves]:
    made = BackgroundSaves(folder)
    yield made
    made.close()


def test_tensors_may_change_as_soon_as_save_returns(
    saves: BackgroundSaves, folder: CheckpointFolder, state: Make, same_bits: Same
) -> None:
    gate, live = Gate(folder), state(5)
    saves.save(5, live)
    live["model"]["embed.weight"].zero_()  # on the CPU an alias would show this
    live["model"]["norm"].fill_(7)
    live["run"]["names"].append("late")
    assert saves.poll() is None
    gate.open.set()
    saves.wait()
    saved = saves.poll()
    assert saved is not None
    assert (saved.step, saved.path) == (5, folder.step_path(5))
    assert same_bits(folder.load(5), state(5))
    assert saves.poll() is None


def test_every_type_is_copied_to_the_bit(saves: BackgroundSaves, folder: CheckpointFolder, same_bits: Same) -> None:
    data = torch.arange(2**12, dtype=torch.int32)
    raw, odd = data.to(torch.uint16).view(torch.uint8), data % 2 == 1
    tree = {"x": {name: odd if dtype == torch.bool else raw.view(dtype) for name, dtype in DTYPES.items()}}
    tree["x"] |= {"t": torch.randn(4, 6).t(), "scalar": torch.tensor(2.0), "empty": torch.empty(0, 3)}
    tree["x"]["tied"] = tree["x"]["F32"]
    saves.save(1, tree)
    saves.wait()
    assert same_bits(folder.load(1), tree)


def test_one_save_is_in_flight_and_the_next_waits_for_it(
    saves: BackgroundSaves, folder: CheckpointFolder, state: Make, same_bits: Same
) -> None:
    gate = Gate(folder)
    saves.save(1, state(1))
    begun = threading.Event()

    def second() -> None:
        saves.save(2, state(2))
        begun.set()

    other = threading.Thread(target=second)
    other.start()
    assert not begun.wait(0.1)
    assert gate.writing == [1]
    gate.open.set()
    other.join(20)
    saves.wait()
    assert gate.writing == [1, 2]
    assert folder.steps() == [1, 2]
    assert all(same_bits(folder.load(step), state(step)) for step in (1, 2))
    assert [saved.step for saved in iter(saves.poll, None)] == [1, 2]


def test_memory_is_kept_from_save_to_save(saves: BackgroundSaves, state: Make) -> None:
    at = set()
    for step in (1, 2, 3):
        saves.save(step, state(step))
        saves.wait()
        at.add(saves._staging._memory.data_ptr())
    assert len(at) == 1


@pytest.mark.parametrize("surfaces", ["save", "poll", "wait", "close"])
def test_an_error_in_the_background_surfaces_and_nothing_is_lost(
    folder: CheckpointFolder, state: Make, same_bits: Same, surfaces: str
) -> None:
    saves = BackgroundSaves(folder)
    saves.save(1, state(1))
    saves.wait()
    gate = Gate(folder)
    gate.error = CheckpointError("the disk is full")
    saves.save(2, state(2))
    gate.open.set()
    running = saves._running
    assert running is not None
    while not running.done():
        threading.Event().wait(0.001)
    with pytest.raises(CheckpointError, match="the disk is full"):
        {"save": lambda: saves.save(3, state(3)), "poll": saves.poll, "wait": saves.wait, "close": saves.close}[
            surfaces
        ]()
    assert gate.writing == [2]  # the save that met the error was not begun
    assert folder.latest() == 1
    assert same_bits(folder.load(1), state(1))
    if surfaces != "close":  # it is told once, and the same state can be saved again
        saves.save(2, state(2))
        saves.close()
        assert same_bits(folder.load(2), state(2))


def test_a_state_that_cannot_be_saved_is_refused_at_once(saves: BackgroundSaves, folder: CheckpointFolder) -> None:
    with pytest.raises(CheckpointError, match=r"state 'run/bad': a builtins.tuple"):
        saves.save(1, {"run": {"bad": (1,)}})
    assert not folder.path.exists()


def test_closing_waits_for_what_is_under_way(folder: CheckpointFolder, state: Make) -> None:
    gate, saves = Gate(folder), BackgroundSaves(folder)
    saves.save(1, state(1))
    threading.Timer(0.05, gate.open.set).start()
    saves.close()
    assert folder.steps() == [1]


def test_ranks_save_together_in_the_background(tmp_path: Path) -> None:
    layout = Layout.of({"m/w": ((8, 3), "F32")}, [("m/w", rank(r), Region((2 * r, 0), (2, 3))) for r in range(4)])
    weights = torch.arange(24.0).reshape(8, 3)

    def work(c: Threads) -> None:
        saves = BackgroundSaves(CheckpointFolder(tmp_path, keep_last=2, coordinator=c))
        mine = weights[2 * c.rank :][:2].clone()
        for step in (1, 2, 3):
            saves.save(step, {"m": {"w": mine}, "run": {"step": step}}, layout)
            mine += 1
        saves.close()

    as_ranks(4, work)
    folder = CheckpointFolder(tmp_path)
    assert folder.steps() == [2, 3]
    for step in (2, 3):
        assert torch.equal(folder.load(step)["m"]["w"], weights + step - 1)


def test_a_full_disk_in_the_background_is_told_in_the_words_of_a_save(
    saves: BackgroundSaves, folder: CheckpointFolder, state: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves.save(100, state(100))
    saves.wait()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        saves.save(200, state(200))
        with pytest.raises(CheckpointError, match=r"disk is full.*step 200 needs.*the checkpoint of step 100 is still"):
            saves.wait()
    assert folder.steps() == [100]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_state_may_change_as_soon_as_save_returns(saves: BackgroundSaves, folder: CheckpointFolder) -> None:
    weight = torch.ones(4_000_000, device="cuda")
    saves.save(1, {"m": {"w": weight, "b": weight[:10].bfloat16()}})
    weight.fill_(9)
    saves.wait()
    assert torch.equal(folder.load(1)["m"]["w"], torch.ones(4_000_000))
    assert saves._staging._memory.is_pinned()


def test_a_rank_without_memory_for_its_copy_fails_all_at_once(tmp_path: Path) -> None:
    layout = Layout.of({"m/w": ((8, 3), "F32")}, [("m/w", rank(r), Region((2 * r, 0), (2, 3))) for r in range(4)])

    def work(c: Threads) -> None:
        saves = BackgroundSaves(CheckpointFolder(tmp_path, coordinator=c))
        if c.rank == 2:

            def none_left(share: Any, steady: Any) -> Any:
                raise MemoryError("no memory for 24 bytes")

            saves._staging.copy = none_left  # type: ignore[method-assign]
        try:
            saves.save(1, {"m": {"w": torch.ones(2, 3)}}, layout)
        finally:
            saves.close()

    found = outcomes(4, work)
    assert [type(error) for error in found] == [CheckpointError, CheckpointError, MemoryError, CheckpointError]
    assert all("rank 2: MemoryError: no memory" in str(found[number]) for number in (0, 1, 3))
    assert CheckpointFolder(tmp_path).steps() == []


@pytest.mark.skipif(sys.platform != "linux", reason="niceness of a thread is Linux's")
def test_the_writing_thread_gives_way_and_the_caller_does_not(saves: BackgroundSaves) -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    writing = saves._thread.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result(20)
    assert writing == max(5, before)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
