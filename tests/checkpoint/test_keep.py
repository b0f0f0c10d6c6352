"""Which checkpoints stay, and who may save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.checkpoint import lock
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder

Make = Callable[[int], dict[str, Any]]


@given(
    steps=st.lists(st.integers(0, 40), unique=True, max_size=8).map(sorted),
    keep_last=st.integers(0, 4),
    keep_every=st.sampled_from([0, 1, 5, 10]),
)
@settings(max_examples=60, deadline=None)
def test_the_newest_and_the_round_ones_stay(steps: list[int], keep_last: int, keep_every: int) -> None:
    with TemporaryDirectory() as at:
        folder = CheckpointFolder(Path(at), keep_last, keep_every)
        pruned: list[int] = []
        for step in steps:
            pruned.extend(folder.save(step, {"step": step}).pruned)
        newest = steps[-keep_last:] if keep_last else steps
        expected = [step for step in steps if step in newest or (keep_every and step % keep_every == 0)]
        assert folder.steps() == expected
        assert sorted(pruned) == [step for step in steps if step not in expected]
        folder.close()


def test_what_was_just_saved_is_never_pruned(folder: CheckpointFolder, state: Make) -> None:
    for step in (100, 200):
        folder.save(step, state(step))
    folder.keep_last = 1
    # The run went back to an earlier step: its checkpoint is the one to keep, though its number is lower.
    assert folder.save(50, state(50)).pruned == (100, 200)
    assert folder.steps() == [50]


def test_going_back_drops_what_came_after(folder: CheckpointFolder, state: Make) -> None:
    for step in (100, 200, 300):
        folder.save(step, state(step))
    assert folder.drop_after(100) == (200, 300)
    assert folder.latest() == 100
    assert folder.drop_after(100) == ()


def test_an_old_checkpoint_that_cannot_be_removed_is_only_a_warning(
    folder: CheckpointFolder, state: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.keep_last = 1
    folder.save(1, state(1))
    rename = os.rename

    def refuse(source: Any, target: Any) -> None:
        if ".removing-" in str(target):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.warns(
        UserWarning, match=r"step-00000001: an old checkpoint could not be removed \(.*Permission denied"
    ):
        assert folder.save(2, state(2)).pruned == ()
    monkeypatch.undo()
    assert folder.save(3, state(3)).pruned == (1, 2)


def test_other_files_in_the_folder_are_left_alone(folder: CheckpointFolder, state: Make) -> None:
    folder.path.mkdir()
    for name in ("notes.txt", "step-12", "best-step-00000001", "step-00000001.bak"):
        (folder.path / name).mkdir()
    folder.keep_last = 1
    folder.save(1, state(1))
    folder.save(2, state(2))
    assert folder.steps() == [2]
    names = {path.name for path in folder.path.iterdir()}
    assert names == {"notes.txt", "step-12", "best-step-00000001", "step-00000001.bak", "step-00000002", ".lock"}


def test_steps_of_more_than_eight_digits_sort_as_numbers(folder: CheckpointFolder) -> None:
    for step in (99_999_999, 100_000_000, 2_000_000_000):
        folder.save(step, {})
    assert folder.steps() == [99_999_999, 100_000_000, 2_000_000_000]
    assert folder.latest() == 2_000_000_000


def test_an_empty_or_absent_folder_has_no_steps(folder: CheckpointFolder) -> None:
    assert folder.steps() == []
    assert folder.latest() is None
    assert not folder.path.exists()  # looking makes nothing


@pytest.mark.parametrize(("step", "keep_last", "keep_every"), [(-1, 0, 0), (1, -1, 0), (1, 0, -1)])
def test_negative_numbers_are_refused(tmp_path: Path, step: int, keep_last: int, keep_every: int) -> None:
    with pytest.raises(ValueError, match="negative"):
        CheckpointFolder(tmp_path, keep_last, keep_every).save(step, {})


# -- one process at a time --------------------------------------------------------------------------------------

HOLDER = """
    import sys
    from pathlib import Path
    from resilin.checkpoint.folder import CheckpointFolder
    folder = CheckpointFolder(Path(sys.argv[1]))
    folder.save(1, {"step": 1})
    print("saved", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_save_into_one_folder_and_the_lock_dies_with_its_holder(
    folder: CheckpointFolder,
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "saved\n"
        for attempt in (folder.lock, lambda: folder.save(2, {"step": 2})):
            with pytest.raises(CheckpointError, match=rf"another process \(process {other.pid} on .*\) is saving"):
                attempt()
        assert folder.load(1) == {"step": 1}  # reading is free
        other.kill()
    folder.save(2, {"step": 2})
    assert folder.steps() == [1, 2]


def test_a_forked_worker_neither_holds_nor_shares_the_lock(folder: CheckpointFolder) -> None:
    folder.lock()
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # like a data worker: it must not save here, and may outlive its parent
        try:
            CheckpointFolder(folder.path).lock()
            os.write(ready[1], b"locked")
        except CheckpointError:
            os.write(ready[1], b"refused")
        os.read(go[0], 1)
        os._exit(0)
    assert os.read(ready[0], 10) == b"refused"
    folder.close()
    probe = "import sys, pathlib; from resilin.checkpoint import lock; lock.lock_folder(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", probe, str(folder.path)], check=True)  # though the child lives
    os.write(go[1], b".")
    assert os.waitpid(child, 0)[1] == 0
    for handle in (*ready, *go):
        os.close(handle)


def test_one_process_may_open_a_folder_twice(folder: CheckpointFolder) -> None:
    other = CheckpointFolder(folder.path)
    folder.save(1, {})
    other.save(2, {})
    other.close()
    other.close()
    folder.save(3, {})
    assert folder.steps() == [1, 2, 3]


def test_a_file_system_without_locks_is_a_warning(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    with pytest.warns(UserWarning, match="this file system has no locks"):
        folder.save(1, {})
    assert folder.steps() == [1]


def test_nothing_is_warned_about_when_all_is_well(folder: CheckpointFolder, state: Make) -> None:
    folder.keep_last = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (1, 2, 3):
            folder.save(step, state(step))
        assert folder.latest() == 3
        folder.load(3)


def test_signal_handlers_are_not_touched(folder: CheckpointFolder) -> None:
    before = signal.getsignal(signal.SIGINT)
    folder.save(1, {})
    assert signal.getsignal(signal.SIGINT) is before
