"""Checkpoints at a URL: no rename, no folders, no lock; the index, written last, is the commit."""

from __future__ import annotations

import errno
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from ranks import as_ranks

from resilin.checkpoint.background import BackgroundSaves
from resilin.checkpoint.consolidate import consolidate
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.inspect import describe, find_checkpoint, list_checkpoints
from resilin.checkpoint.load import load_part
from resilin.checkpoint.object_storage import ObjectRoot
from resilin.checkpoint.read import load_checkpoint
from resilin.checkpoint.reader import CheckpointReader
from resilin.checkpoint.verify import damages
from resilin.layout import Layout, Region, rank

Make = Callable[[int], dict[str, Any]]
Same = Callable[[Any, Any], bool]
_NUMBER = itertools.count()


@pytest.fixture
def url() -> str:
    return f"memory://bucket-{next(_NUMBER)}/run"


@pytest.fixture
def memory() -> Any:
    return fsspec.filesystem("memory")


def files(memory: Any, url: str) -> list[str]:
    root = url.removeprefix("memory:/")
    return sorted(path.removeprefix(f"{root}/") for path in memory.find(root))


def test_what_is_saved_at_a_url_comes_back_to_the_bit(url: str, memory: Any, state: Make, same_bits: Same) -> None:
    folder = CheckpointFolder(url, keep_last=2)
    for step in (1, 2, 3):
        saved = folder.save(step, state(step))
    assert saved.path == f"{url}/step-00000003"
    assert saved.pruned == (1,)
    assert folder.steps() == [2, 3]
    assert same_bits(folder.load(3), state(3))
    assert same_bits(folder.load(3, mapped=True, parts=["model"]), {"model": state(3)["model"]})
    assert files(memory, url) == [
        f"step-0000000{step}/{name}"
        for step in (2, 3)
        for name in ("index.json", "model.safetensors", "optimizer.safetensors")
    ]
    assert describe(url).step == 3
    assert find_checkpoint(url, 2) == f"{url}/step-00000002"
    assert [line.step for line in list_checkpoints(url)] == [2, 3]
    assert list(damages(saved.path)) == []


def test_the_bytes_are_those_of_a_local_disk(url: str, memory: Any, folder: CheckpointFolder, state: Make) -> None:
    CheckpointFolder(url).save(1, state(1))
    folder.save(1, state(1))
    for file in folder.step_path(1).iterdir():
        assert memory.cat_file(f"{url.removeprefix('memory:/')}/step-00000001/{file.name}") == file.read_bytes()


def test_a_local_url_is_a_local_disk(tmp_path: Path, state: Make) -> None:
    folder = CheckpointFolder(f"file://{tmp_path}/run")
    folder.save(1, state(1))
    assert (tmp_path / "run" / "step-00000001" / "index.json").exists()
    folder.close()


def test_a_store_that_has_folders_is_served_as_well(tmp_path: Path, state: Make, same_bits: Same) -> None:
    folder = CheckpointFolder("memory://unused", keep_last=2)
    folder._root = folder._saver._root = ObjectRoot(f"file://{tmp_path}/deep/run")  # as SFTP or HDFS are
    for step in (1, 2, 3, 3):
        folder.save(step, state(step))
    assert folder.steps() == [2, 3]
    assert same_bits(load_checkpoint(tmp_path / "deep" / "run" / "step-00000003"), state(3))
    assert sorted(file.name for file in (tmp_path / "deep" / "run").iterdir()) == ["step-00000002", "step-00000003"]


def test_a_step_saved_again_replaces_the_first_in_one_step(url: str, memory: Any, state: Make, same_bits: Same) -> None:
    folder = CheckpointFolder(url)
    folder.save(1, state(1))
    for content in (7, 8):
        folder.save(1, state(content))
        assert same_bits(folder.load(1), state(content))
    assert files(memory, url) == [
        "step-00000001/index.json",
        "step-00000001/model~r3.safetensors",
        "step-00000001/optimizer~r3.safetensors",
    ]


def test_ranks_save_together_and_any_layout_is_read_by_ranges(url: str) -> None:
    layout = Layout.of({"m/w": ((8, 3), "F32")}, [("m/w", rank(r), Region((2 * r, 0), (2, 3))) for r in range(4)])
    weights = torch.arange(24.0).reshape(8, 3)

    def work(c: Any) -> None:
        saves = BackgroundSaves(CheckpointFolder(url, coordinator=c))
        saves.save(1, {"m": {"w": weights[2 * c.rank :][:2]}}, layout)
        saves.close()

    as_ranks(4, work)
    other = Layout.of({"m/w": ((8, 3), "F32")}, [("m/w", rank(0), Region((1, 1), (6, 2)))])
    assert torch.equal(load_part(f"{url}/step-00000001", other, rank(0)).tree["m"]["w"], weights[1:7, 1:])
    saved = consolidate(f"{url}/step-00000001", f"{url}-whole")
    with CheckpointReader(saved.path) as whole:
        assert whole.record("m/w").is_whole
        assert torch.equal(whole.tensor("m/w"), weights)


# -- failures ---------------------------------------------------------------------------------------------------


class Failing:
    """Counts the requests that change a store, and fails the n-th."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None) -> None:
        self.count, self.at = 0, at
        kind = type(fsspec.filesystem("memory"))
        for name in ("open", "pipe_file", "rm_file"):
            patch.setattr(kind, name, self._wrapped(getattr(kind, name), name))

    def _wrapped(self, real: Any, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if name != "open" or "w" in str(args[2:]) + str(options):
                number, self.count = self.count, self.count + 1
                if number == self.at:
                    raise OSError(errno.EIO, "the store does not answer")
            return real(*args, **options)

        return call


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("background", [False, True])
def test_whichever_request_fails_the_newest_committed_checkpoint_is_whole(
    state: Make, same_bits: Same, step: int, background: bool
) -> None:
    outcomes: set[str] = set()
    for at in itertools.count():
        url = f"memory://bucket-{next(_NUMBER)}/run"
        folder = CheckpointFolder(url, keep_last=2, second_copy=True)
        folder.save(1, state(1))
        folder.save(2, state(2))
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            failing = Failing(patch, at)
            try:
                if background:
                    saves = BackgroundSaves(folder)
                    saves.save(step, state(7))
                    saves.close()
                else:
                    folder.save(step, state(7))
                outcomes.add("saved")
            except CheckpointError as error:
                outcomes.add("refused" if "the store does not answer" in str(error) else str(error))
        latest = folder.latest()
        assert latest in (2, step), at
        contents = [state(7)] if latest == 3 else [state(2), state(7)] if step == 2 else [state(2)]
        assert any(same_bits(folder.load(latest), content) for content in contents), at
        folder.save(4, state(4))
        assert same_bits(folder.load(4), state(4))
        assert all(list(damages(folder.step_path(one))) == [] for one in folder.steps()), at
        if failing.count <= at:
            break
    assert outcomes == {"saved", "refused"}


def test_a_removal_cut_short_leaves_no_checkpoint(url: str, state: Make) -> None:
    folder = CheckpointFolder(url, keep_last=1)
    folder.save(1, state(1))
    with pytest.MonkeyPatch.context() as patch:
        real = type(fsspec.filesystem("memory")).rm_file

        def rm_file(self: Any, path: str) -> None:
            if path.endswith("model.safetensors"):
                raise OSError(errno.EIO, "the store does not answer")
            real(self, path)

        patch.setattr(type(fsspec.filesystem("memory")), "rm_file", rm_file)
        with pytest.warns(UserWarning, match=r"step-00000001: an old checkpoint could not be removed"):
            folder.save(2, state(2))
    assert folder.steps() == [2]
    folder.save(3, state(3))  # and cleans up
    assert folder.steps() == [3]


def test_a_store_that_is_not_known_or_does_not_exist_is_named(state: Make) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere://bucket: checkpoints cannot be kept here: .*nowhere"):
        CheckpointFolder("nowhere://bucket")
    assert CheckpointFolder("memory://not-there").steps() == []
    with pytest.raises(CheckpointError, match=r"memory://not-there: there is no checkpoint of step 1"):
        CheckpointFolder("memory://not-there").load(1)


def test_damage_at_a_url_names_file_and_tensor(url: str, memory: Any, state: Make) -> None:
    folder = CheckpointFolder(url)
    folder.save(1, state(1))
    path = f"{url.removeprefix('memory:/')}/step-00000001/model.safetensors"
    data = bytearray(memory.cat_file(path))
    data[-1] ^= 1
    memory.pipe_file(path, bytes(data))
    with pytest.raises(CheckpointError, match=r"memory://.*/model.safetensors: the checksum of tensor 'norm'"):
        folder.load(1)
    memory.rm_file(path)
    with pytest.raises(CheckpointError, match=r"memory://.*/model.safetensors: the file is missing"):
        folder.load(1)
