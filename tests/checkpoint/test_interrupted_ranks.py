"""A save of several ranks, or one in the background, that is cut short anywhere costs nothing saved before."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Fault, fail
from ranks import outcomes

from resilin.checkpoint.background import BackgroundSaves
from resilin.checkpoint.coordinator import Threads
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.verify import damages
from resilin.layout import Layout, Region, rank

RANKS = 3
Same = Callable[[Any, Any], bool]
LAYOUT = Layout.of(
    {"model/w": ((9, 4), "F32"), "optimizer/w": ((9, 4), "F32"), "model/all": ((5,), "F32")},
    [(f"{part}/w", rank(r), Region((3 * r, 0), (3, 4))) for part in ("model", "optimizer") for r in range(RANKS)]
    + [("model/all", rank(r), Region((0,), (5,))) for r in range(RANKS)],
)


def whole(content: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(content)
    w, m = torch.randn(9, 4, generator=draw), torch.randn(9, 4, generator=draw)
    return {"model": {"w": w, "all": torch.full((5,), content * 1.0)}, "optimizer": {"w": m}, "run": {"step": content}}


def share(content: int, number: int) -> dict[str, Any]:
    tree = whole(content)
    for part in ("model", "optimizer"):
        tree[part]["w"] = tree[part]["w"][3 * number :][:3]
    return tree


def save(path: Path, step: int, content: int, background: bool = False) -> list[Any]:
    def work(c: Threads) -> None:
        folder = CheckpointFolder(path, keep_last=2, second_copy=True, coordinator=c)
        try:
            if background:
                saves = BackgroundSaves(folder)
                saves.save(step, share(content, c.rank), LAYOUT)
                saves.close()
            else:
                folder.save(step, share(content, c.rank), LAYOUT)
        finally:
            folder.close()

    return outcomes(RANKS, work)


def leftovers(path: Path) -> list[str]:
    return [file.name for file in path.iterdir() if not re.fullmatch(r"step-\d{8}|\.lock", file.name)]


def count_calls(path: Path, step: int) -> int:
    save(path, 1, 1)
    save(path, 2, 2)
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, None, lambda: None)
        assert save(path, step, 7) == [None] * RANKS
    assert {"write", "fsync", "rename", "mkdir", "unlink"} <= set(fault.log)
    return fault.count


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("background", [False, True])
def test_whichever_call_of_whichever_rank_fails_the_newest_checkpoint_loads_to_the_bit(
    tmp_path: Path, same_bits: Same, step: int, background: bool
) -> None:
    calls, seen = count_calls(tmp_path / "count", step), set()
    for at in range(calls):
        path = tmp_path / str(at)
        save(path, 1, 1)
        save(path, 2, 2)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a thread: an old checkpoint could not be removed
            Fault(patch, at, fail(errno.ENOSPC))
            results = save(path, step, 7, background)
        failed = [result for result in results if result is not None]
        assert all(isinstance(error, CheckpointError) for error in failed), (at, results)
        assert len(failed) in (0, RANKS), (at, results)  # all ranks agree on how it ended
        seen.add(len(failed))
        folder = CheckpointFolder(path)
        latest = folder.latest()
        assert latest in (2, step), at
        contents = [whole(7)] if latest == 3 else [whole(2), whole(7)] if step == 2 else [whole(2)]
        assert any(same_bits(folder.load(latest), content) for content in contents), at
        assert list(damages(folder.step_path(latest))) == []
        assert save(path, 4, 4) == [None] * RANKS
        assert leftovers(path) == [], at
        assert same_bits(folder.load(4), whole(4))
    assert seen == {0, RANKS}


def test_a_rank_that_is_killed_while_it_writes_commits_nothing(tmp_path: Path, same_bits: Same) -> None:
    save(tmp_path, 1, 1)

    def work(c: Threads) -> None:
        folder = CheckpointFolder(tmp_path, coordinator=c)
        prepared = folder.prepare(2, share(2, c.rank), LAYOUT)
        if c.rank == 2:
            real = folder._saver._guarded

            def gone(step: int, part: Any, mine: Any, lead: Any) -> Any:
                if lead.__name__ == "conclude":
                    c.leave()  # as a killed process: it never reports
                    raise SystemExit
                return real(step, part, mine, lead)

            folder._saver._guarded = gone  # type: ignore[method-assign]
        try:
            folder.write(2, prepared)
        except SystemExit:
            pass
        finally:
            folder.close()

    results = outcomes(RANKS, work)
    assert all("another rank did not come" in str(result) for result in results[:2])
    folder = CheckpointFolder(tmp_path)
    assert folder.steps() == [1]
    assert same_bits(folder.load(1), whole(1))
    assert save(tmp_path, 3, 3) == [None] * RANKS
    assert leftovers(tmp_path) == []


def test_killed_at_any_call_of_a_save_in_the_background(
    tmp_path: Path, same_bits: Same, in_a_child: Callable[[Callable[[], None]], int]
) -> None:
    def begin(path: Path) -> CheckpointFolder:
        folder = CheckpointFolder(path, keep_last=2)
        folder.save(1, whole(1))
        folder.save(2, whole(2))
        return folder

    with pytest.MonkeyPatch.context() as patch:
        counted = begin(tmp_path / "count")
        fault = Fault(patch, None, lambda: None)
        saves = BackgroundSaves(counted)
        saves.save(3, whole(7))
        saves.close()
    newest = set()
    for at in range(fault.count):
        folder = begin(tmp_path / str(at))
        folder.close()

        def save_and_die(at: int = at, folder: CheckpointFolder = folder) -> None:
            with pytest.MonkeyPatch.context() as patch:
                Fault(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                saves = BackgroundSaves(folder)
                saves.save(3, whole(7))
                saves.close()

        assert in_a_child(save_and_die) == signal.SIGKILL, at
        survivor = CheckpointFolder(folder.path, keep_last=2)
        latest = survivor.latest()
        assert latest in (2, 3)
        assert same_bits(survivor.load(latest), whole(7) if latest == 3 else whole(2)), at
        newest.add(latest)
        survivor.save(4, whole(4))
        assert leftovers(survivor.path) == []
        survivor.close()
    assert newest == {2, 3}
    assert threading.active_count() < 10
