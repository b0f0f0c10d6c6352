"""DTensors: their layout follows from mesh and placements; real gloo processes save together, and others load."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from forked import run_ranks

from resilin.checkpoint.dtensor import layout_of_specs, param_spec
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.inspect import describe
from resilin.checkpoint.verify import damages

SHAPES = [(8, 8), (7, 5), (3, 2, 4), (1,), (10,)]
MESHES = [(4,), (2, 2), (2, 3), (2, 2, 2)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_regions_are_where_torch_says(mesh: tuple[int, ...]) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as torchs
    from torch.distributed.tensor.placement_types import _StridedShard

    def kinds(shape: tuple[int, ...]) -> list[Any]:
        dims = range(len(shape))
        return [Replicate(), *map(Shard, dims), *(_StridedShard(0, split_factor=mesh[-1]) for _ in mesh[1:2])]

    numbers = [list(range(size)) for size in mesh]
    checked = 0
    for shape in SHAPES:
        for placements in itertools.product(kinds(shape), repeat=len(mesh)):
            strided = [n for n, p in enumerate(placements) if isinstance(p, _StridedShard)]
            # As FSDP after tensor parallelism has it: strided on the last but one, with a plain shard to its right.
            if strided and (
                strided != [len(mesh) - 2] or placements[-1] != Shard(0) or shape[0] % (mesh[-1] * mesh[-2])
            ):
                continue
            if strided and any(p == Shard(0) for p in placements[: len(mesh) - 2]):
                continue
            spec = [[getattr(p, "dim", -1), getattr(p, "split_factor", 1)] for p in placements]
            whole = torch.arange(torch.Size(mesh).numel()).reshape(mesh).tolist()
            layout = layout_of_specs([{"w": [list(shape), "F32", whole, spec]}] * torch.Size(mesh).numel())
            assert param_spec(shape, "F32", mesh, spec).shape == shape
            for number, coordinate in enumerate(itertools.product(*numbers)):
                sizes, offsets = torchs(shape, mesh, lambda dim, at=coordinate: at[dim], placements)
                mine = [h for h in layout if h.place.name == str(number)]
                if 0 in sizes:
                    assert mine == []
                else:
                    assert [(h.region.offsets, h.region.sizes) for h in mine] == [(tuple(offsets), tuple(sizes))]
                checked += 1
    assert checked > 50


def test_ranks_that_say_different_things_of_a_tensor_are_refused_by_name() -> None:
    mine, other = [[4], "F32", [0, 1], [[0, 1]]], [[5], "F32", [0, 1], [[0, 1]]]
    with pytest.raises(CheckpointError, match=r"tensor 'w': rank 1 says \[\[5\]"):
        layout_of_specs([{"w": mine}, {"w": other}])


def test_a_folder_without_all_the_ranks_is_told_so() -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'w' is a DTensor over rank 3, but 1 ranks save.*a coordinator"):
        layout_of_specs([{"w": [[4], "F32", [0, 1, 2, 3], [[0, 1]]]}])


def test_pipeline_stages_each_know_their_own_tensors() -> None:
    first, last = [[4], "F32", [0, 1], [[0, 1]]], [[6], "F32", [2, 3], [[0, 1]]]
    layout = layout_of_specs([{"a": first}, {"a": first}, {"b": last}, {"b": last}])
    assert {(h.tensor, h.place.name, str(h.region)) for h in layout} == {
        ("a", "0", "[0:2]"),
        ("a", "1", "[2:4]"),
        ("b", "2", "[0:3]"),
        ("b", "3", "[3:6]"),
    }


# -- real processes ---------------------------------------------------------------------------------------------


def values() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {"up": torch.randn(12, 7, generator=draw), "down": torch.randn(7, 12, generator=draw)} | {
        "norm": torch.randn(7, generator=draw), "odd": torch.randn(5, 3, generator=draw),
    }  # fmt: skip


def tree_on(mesh: Any, zeros: bool) -> dict[str, Any]:
    """Over data and tensor parallelism where there are two dimensions, over all ranks where there is one."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    two = mesh.ndim == 2
    placements = {
        "up": [_StridedShard(0, split_factor=2), Shard(0)] if two else [Shard(0)],  # FSDP2 after tensor parallelism
        "down": [Shard(0), Shard(1)] if two else [Shard(1)],
        "norm": [Replicate(), Replicate()] if two else [Replicate()],
        "odd": [Shard(0), Shard(0)] if two else [Shard(0)],
    }
    made = {}
    for name, value in values().items():
        value = torch.zeros_like(value) if zeros else value
        # `distribute_tensor` does not cut strided shards: cut by hand as FSDP2 does.
        if name == "up" and two:
            from torch.distributed.tensor import DTensor

            dp, tp = mesh.get_coordinate()
            local = value.chunk(2)[tp].chunk(2)[dp].contiguous()
            made[name] = DTensor.from_local(local, mesh, placements[name], shape=value.shape, stride=value.stride())
        else:
            made[name] = distribute_tensor(value, mesh, placements[name])
    moments = {n: {"exp_avg": t * 2, "step": torch.tensor(0.0 if zeros else 4.0)} for n, t in made.items()}
    return {"model": made | {"tied": made["up"]}, "optimizer": moments, "run": {"samples": 0 if zeros else 96}}


def save_from_four(rank: int, path: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from resilin.checkpoint.background import BackgroundSaves
    from resilin.checkpoint.process_group import ProcessGroup

    mesh = init_device_mesh("cpu", (2, 2))
    tree = tree_on(mesh, zeros=False)
    saves = BackgroundSaves(
        CheckpointFolder(path, keep_last=2, coordinator=ProcessGroup(dist.new_group(backend="gloo")))
    )
    for step in (1, 2):
        saves.save(step, tree)
        dist.all_reduce(torch.ones(1))  # training's own messages meet nothing of the save's
    saves.close()


def load_on_three(rank: int, path: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from resilin.checkpoint.process_group import ProcessGroup

    mesh = init_device_mesh("cpu", (3,))
    folder = CheckpointFolder(path, coordinator=ProcessGroup(dist.new_group(backend="gloo")))
    found = folder.load_like(2, tree_on(mesh, zeros=True))
    for name, value in values().items():
        assert torch.equal(found["model"][name].full_tensor(), value), name
        assert torch.equal(found["optimizer"][name]["exp_avg"].full_tensor(), value * 2), name
    assert found["model"]["tied"] is found["model"]["up"]
    assert found["run"] == {"samples": 96}
    assert float(found["optimizer"]["up"]["step"]) == 4
    folder.save(3, found)


def test_four_processes_save_and_three_load(tmp_path: Path) -> None:
    assert "RANK" not in os.environ
    path = str(tmp_path / "checkpoints")
    run_ranks(4, save_from_four, path)
    folder = CheckpointFolder(path)
    assert folder.steps() == [1, 2]
    run_ranks(3, load_on_three, path)
    assert folder.steps() == [1, 2, 3]
    for step in (2, 3):
        state = folder.load(step)
        assert all(torch.equal(state["model"][name], value) for name, value in values().items())
        assert state["model"]["tied"] is state["model"]["up"]
        assert list(damages(folder.step_path(step))) == []
        assert describe(folder.path, step).files == {2: 8, 3: 6}[step]


def one_dies(rank: int, world: int, meeting: str, path: str) -> None:
    """Rank 2 is gone once its files are written; the others must be told, and leave without it."""
    import torch.distributed as dist

    from resilin.checkpoint.process_group import ProcessGroup

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    folder = CheckpointFolder(path, coordinator=ProcessGroup(dist.group.WORLD))
    state = {"model": {"w": torch.arange(300_000.0)}, "run": {"step": 1}}
    folder.save(1, state)
    if rank == 2:
        real = folder._saver._guarded

        def dying(step: int, share: Any, mine: Any, lead: Any) -> Any:
            if lead.__name__ == "conclude":
                mine()
                os._exit(0)
            return real(step, share, mine, lead)

        folder._saver._guarded = dying  # type: ignore[method-assign]
    try:
        folder.save(2, state)
    except CheckpointError as error:
        Path(f"{meeting}-{rank}").write_text(str(error))
    os._exit(0)  # the group is beyond repair, and so is its ending


def test_a_process_that_dies_during_a_save_costs_nothing_saved_before(
    tmp_path: Path,
) -> None:
    path, meeting = tmp_path / "checkpoints", tmp_path / "meeting"
    mp.start_processes(one_dies, (3, str(meeting), str(path)), nprocs=3, start_method="forkserver")
    for rank in (0, 1):
        assert "lost each other" in Path(f"{meeting}-{rank}").read_text()
    folder = CheckpointFolder(path)
    assert folder.steps() == [1]
    assert torch.equal(folder.load(1)["model"]["w"], torch.arange(300_000.0))
    folder.save(3, folder.load(1))
    assert sorted(file.name for file in path.iterdir()) == [".lock", "step-00000001", "step-00000003"]
