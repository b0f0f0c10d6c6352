"""A save that is cut short, at any system call and in any way, costs nothing that was saved before."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Fault, fail

from resilin.checkpoint.atomic import write_file
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder

Make = Callable[[int], dict[str, Any]]
Same = Callable[[Any, Any], bool]


def leftovers(folder: CheckpointFolder) -> list[str]:
    return [path.name for path in folder.path.iterdir() if not re.fullmatch(r"step-\d{8}|\.lock", path.name)]


def prepared(path: Path, state: Make) -> CheckpointFolder:
    folder = CheckpointFolder(path, keep_last=2)
    folder.save(1, state(1))
    folder.save(2, state(2))
    return folder


def count_calls(path: Path, state: Make, step: int, content: int) -> list[str]:
    folder = prepared(path, state)
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, None, lambda: None)
        folder.save(step, state(content))
    folder.close()
    return fault.log


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["disk full", "bad disk"])
@pytest.mark.filterwarnings("ignore:.*an old checkpoint could not be removed")
def test_any_failing_call_leaves_earlier_checkpoints_good(
    tmp_path: Path, state: Make, same_bits: Same, step: int, error: int
) -> None:
    calls = count_calls(tmp_path / "count", state, step, 7)
    assert {"write", "fsync", "rename", "mkdir", "unlink"} <= set(calls)
    outcomes = set()
    for at in range(len(calls)):
        folder = prepared(tmp_path / str(at), state)
        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, at, fail(error))
            try:
                folder.save(step, state(7))
                outcomes.add("saved")
            except CheckpointError as failure:
                outcomes.add("refused")
                good = int(re.search(r"checkpoint of step (\d) is still good", str(failure))[1])  # type: ignore[index]
                assert good in folder.steps()
        present = folder.steps()
        for other in present:
            contents = (state(other), state(7)) if other == step else (state(other),)
            assert any(same_bits(folder.load(other), content) for content in contents), (at, calls[at], other)
        assert 2 in present, (at, calls[at])
        folder.save(4, state(4))
        assert leftovers(folder) == [], (at, calls[at])
        assert same_bits(folder.load(4), state(4))
        folder.close()
    assert outcomes == {"saved", "refused"}  # some calls only tidy up: failing there loses nothing


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "the same step again"])
def test_killed_at_any_call_leaves_earlier_checkpoints_good(
    tmp_path: Path, state: Make, same_bits: Same, in_a_child: Callable[[Callable[[], None]], int], step: int
) -> None:
    calls = count_calls(tmp_path / "count", state, step, 7)
    newest = set()
    for at in range(len(calls)):
        folder = prepared(tmp_path / str(at), state)
        folder.close()

        def save_and_die(at: int = at, folder: CheckpointFolder = folder) -> None:
            with pytest.MonkeyPatch.context() as patch:
                Fault(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                folder.save(step, state(7))

        assert in_a_child(save_and_die) == signal.SIGKILL, (at, calls[at])
        survivor = CheckpointFolder(folder.path, keep_last=2)
        latest = survivor.latest()
        assert latest is not None
        found = survivor.load(latest)
        contents = [state(7)] if latest == 3 else [state(2), state(7)] if step == 2 else [state(2)]
        assert any(same_bits(found, content) for content in contents), (at, calls[at])
        newest.add((latest, same_bits(found, state(7))))
        survivor.save(4, state(4))
        assert leftovers(survivor) == [], (at, calls[at])
        assert survivor.steps() in ([latest, 4], [2, 4]), (at, calls[at])
        survivor.close()
    assert newest == {(2, False), (step, True)}  # killed before the commit, and after it


def test_everything_is_on_disk_before_the_name_that_vouches_for_it(
    folder: CheckpointFolder, state: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    real_open, real_rename = os.open, os.rename

    def opened(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            done.append(("create", Path(path).name))
        return real_open(path, flags, *rest, **options)

    def synced(handle: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{handle}").readlink().name))

    def renamed(source: Any, target: Any) -> None:
        done.append(("rename", Path(target).name))
        real_rename(source, target)

    folder.lock()
    for name, replacement in (("open", opened), ("fsync", synced), ("rename", renamed)):
        monkeypatch.setattr(os, name, replacement)
    folder.save(5, state(5))
    assert done == [
        ("create", "model.safetensors"),
        ("sync", "model.safetensors"),
        ("create", "optimizer.safetensors"),
        ("sync", "optimizer.safetensors"),
        ("create", "index.json"),
        ("sync", "index.json"),
        ("sync", ".saving-step-00000005"),
        ("rename", "step-00000005"),
        ("sync", "checkpoints"),
    ]


def test_a_short_write_is_continued(
    folder: CheckpointFolder, state: Make, same_bits: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, memoryview(data)[: max(1, len(data) // 3)]))
    folder.save(1, state(1))
    monkeypatch.undo()
    assert same_bits(folder.load(1), state(1))


def test_a_full_disk_says_what_was_needed_and_what_is_still_good(folder: CheckpointFolder, state: Make) -> None:
    folder.save(100, state(100))
    big = {"model": {"w": torch.zeros(1_000_000)}}
    with pytest.MonkeyPatch.context() as patch:
        Fault(patch, 6, fail(errno.ENOSPC))
        with pytest.raises(CheckpointError) as caught:
            folder.save(200, big)
    text = str(caught.value)
    assert re.search(
        r"the disk is full: the checkpoint of step 200 needs 4 MB and [\d.]+ [kMGT]?B are free "
        r"\(No space left on device\); the checkpoint of step 100 is still good\. Free some space",
        text,
    ), text


def test_a_disk_that_is_really_full(tmp_path: Path, same_bits: Same) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        folder = CheckpointFolder(tmp_path / "checkpoints")
        small = {"model": {"w": torch.randn(200_000)}}
        folder.save(1, small)
        with pytest.raises(
            CheckpointError, match=r"disk is full: the checkpoint of step 2 needs 2 MB .* step 1 is still"
        ):
            folder.save(2, {"model": {"w": torch.randn(500_000)}})
        assert leftovers(folder) == []
        assert same_bits(folder.load(1), small)
        folder.save(3, small)  # the space of the failed save is free again
        assert folder.steps() == [1, 3]
        folder.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, state: Make) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/checkpoints: checkpoints cannot be kept here: Not a directory"):
        CheckpointFolder(tmp_path / "file" / "checkpoints").save(1, state(1))


def test_an_interrupt_during_a_save_leaves_nothing_behind(folder: CheckpointFolder, state: Make) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    folder.save(1, state(1))
    with pytest.MonkeyPatch.context() as patch:
        Fault(patch, 9, interrupt)
        with pytest.raises(KeyboardInterrupt):
            folder.save(2, state(2))
    assert folder.steps() == [1]
    assert leftovers(folder) == []


# -- single files -----------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_file(path, "old")
    with pytest.MonkeyPatch.context() as patch:
        calls = Fault(patch, None, lambda: None)
        write_file(path, "old")
    for at in range(calls.count):
        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, at, fail(errno.EIO))
            try:
                write_file(path, "new")
            except OSError:
                assert path.read_text() in ("old", "new")
        assert path.read_text() in ("old", "new")
        assert [file.name for file in tmp_path.iterdir() if file.name != "x.json"] in (
            [],
            [f".x.json.{os.getpid()}.tmp"],
        )
        write_file(path, "old")
        assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_file_takes_text_and_bytes(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "ä")
    write_file(tmp_path / "b", b"\xff")
    assert (tmp_path / "a").read_bytes() == "ä".encode()
    assert (tmp_path / "b").read_bytes() == b"\xff"
