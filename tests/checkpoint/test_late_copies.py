"""What is steady may be copied late: what is saved is the state of the moment of `save`, or nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import outcomes
from torch import Tensor

from resilin.checkpoint.background import BackgroundSaves
from resilin.checkpoint.coordinator import Threads
from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.folder import CheckpointFolder
from resilin.checkpoint.late_copies import LateCopies, row_order
from resilin.layout import Layout, Region, rank

Same = Callable[[Any, Any], bool]
SIZE = 20_000  # elements, well above what is copied at once


@pytest.fixture
def as_late_as_possible(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The writing thread copies nothing: what is asked to change its memory has to. The event lets the thread go on."""
    go, complete = threading.Event(), LateCopies.complete

    def held(self: LateCopies) -> None:
        assert go.wait(20)
        complete(self)

    monkeypatch.setattr(LateCopies, "complete", held)
    yield go
    go.set()


@pytest.fixture
def saves(folder: CheckpointFolder) -> Iterator[BackgroundSaves]:
    made = BackgroundSaves(folder)
    yield made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "_running", None)  # its errors were looked for
        made.close()


def clone(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: clone(value) for key, value in tree.items()}
    return tree.clone() if isinstance(tree, Tensor) else tree


def weights_and_more() -> tuple[dict[str, Any], list[Tensor]]:
    """Steady tensors of every kind of memory, and others."""
    flat = torch.randn(3 * SIZE)
    steady = {
        "plain": torch.randn(SIZE),
        "matrix": torch.randn(300, 100),
        "channels last": torch.randn(8, 16, 16, 16).to(memory_format=torch.channels_last),
        "turned": torch.randn(300, 100).t(),
        "columns": torch.randn(300, 200)[:, :100],
        "bf16": torch.randn(2 * SIZE).bfloat16(),
        "bytes": torch.randint(0, 255, (5 * SIZE,), dtype=torch.uint8),
        "narrow": torch.randn(5 * SIZE).to(torch.float8_e4m3fn),
        "flags": torch.rand(5 * SIZE) > 0.5,
        "complex": torch.randn(SIZE, dtype=torch.complex64),
        "conjugated": torch.randn(SIZE, dtype=torch.complex64).conj(),
        "nan": torch.full((SIZE,), torch.nan),
        "part of a buffer": flat[SIZE : 2 * SIZE].view(100, -1),
        "small": torch.randn(7),
        "scalar": torch.tensor(3.0),
    }
    tree = {"model": steady | {"tied": steady["matrix"], "statistics": torch.randn(SIZE)}, "run": {"step": 3}}
    return tree, [*(t for name, t in steady.items() if name != "part of a buffer"), flat]


@pytest.mark.parametrize("late", [True, False], ids=["as late as possible", "whenever it comes"])
def test_what_is_saved_is_what_was_at_the_time_of_save(
    saves: BackgroundSaves, folder: CheckpointFolder, same_bits: Same, late: bool, request: pytest.FixtureRequest
) -> None:
    go = request.getfixturevalue("as_late_as_possible") if late else threading.Event()
    for step in (1, 2):  # the second time in memory that holds the first
        tree, steady = weights_and_more()
        before = clone(tree)
        before["model"]["tied"] = before["model"]["matrix"]
        go.clear()
        saves.save(step, tree, steady=steady)
        tree["model"]["statistics"].zero_()  # it was not said to be steady
        saves.staged()
        for tensor in tree["model"].values():
            tensor.zero_()
        go.set()
        saves.wait()
        assert same_bits(folder.load(step), before)


def test_without_steady_tensors_all_is_copied_at_once(
    saves: BackgroundSaves, folder: CheckpointFolder, same_bits: Same, as_late_as_possible: threading.Event
) -> None:
    tree, _ = weights_and_more()
    before = clone(tree)
    before["model"]["tied"] = before["model"]["matrix"]
    saves.save(1, tree)
    for tensor in tree["model"].values():
        tensor.zero_()
    as_late_as_possible.set()
    saves.wait()
    assert same_bits(folder.load(1), before)


def fused_adamw(weight: Tensor) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "one element in place": lambda w: w.detach()[5].add_(1),
    "through a view": lambda w: w.detach().view(-1)[:3].zero_(),
    "all of it through .data": lambda w: w.data.mul_(0.5),
    "a kernel that counts no changes": fused_adamw,
    "foreach": lambda w: torch._foreach_add_([w.detach()], 1.0),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_tensor_that_changes_too_early_fails_the_save_by_name(
    saves: BackgroundSaves, folder: CheckpointFolder, same_bits: Same, as_late_as_possible: threading.Event, how: str
) -> None:
    weight, other = torch.nn.Parameter(torch.randn(200, 200)), torch.randn(SIZE)
    tree = {"model": {"other": other, "weight": weight}}
    as_late_as_possible.set()
    saves.save(1, tree, steady=[other, weight])
    saves.staged()
    saves.wait()
    assert folder.steps() == [1]
    as_late_as_possible.clear()
    saves.save(2, tree, steady=[other, weight])
    CHANGES[how](weight)
    saves.staged()
    as_late_as_possible.set()
    with pytest.raises(CheckpointError, match="tensor 'model/weight' was changed while it was being saved"):
        saves.wait()
    assert folder.steps() == [1]
    assert [path.name for path in folder.path.iterdir() if path.name.startswith(".saving")] == []
    before = clone(tree)
    saves.save(3, tree, steady=[other, weight])  # it is told once, and the next save is as any
    saves.staged()
    weight.data.zero_()
    saves.wait()
    assert same_bits(folder.load(3), before)


def test_changes_after_staging_are_none_of_its_business(saves: BackgroundSaves, folder: CheckpointFolder) -> None:
    weight = torch.zeros(SIZE)
    for step in range(20):  # the thread may look before the change or after it
        saves.save(step, {"w": weight}, steady=[weight])
        saves.staged()
        weight += 1
    saves.wait()
    assert all(torch.equal(folder.load(step)["w"], torch.full((SIZE,), float(step))) for step in range(20))


def test_a_copy_that_is_interrupted_is_made_again(
    saves: BackgroundSaves, folder: CheckpointFolder, as_late_as_possible: threading.Event
) -> None:
    weight = torch.arange(5e6)  # several chunks
    saves.save(1, {"w": weight}, steady=[weight])
    copy, calls = np.copyto, 0

    def interrupted(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        copy(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "copyto", interrupted)
        with pytest.raises(KeyboardInterrupt):
            saves.staged()
        assert calls == 2
        saves.staged()
    weight.zero_()
    as_late_as_possible.set()
    saves.wait()
    assert torch.equal(folder.load(1)["w"], torch.arange(5e6))


def test_who_waits_does_not_wait_for_a_thread_that_has_no_processor(
    saves: BackgroundSaves, folder: CheckpointFolder
) -> None:
    """The thread is busy elsewhere all the time: `staged` copies by itself."""
    release, weight = threading.Event(), torch.zeros(SIZE)
    saves._thread.submit(release.wait, 20)
    saves.save(1, {"w": weight}, steady=[weight])
    saves.staged()
    weight.fill_(1)
    release.set()
    saves.wait()
    assert torch.equal(folder.load(1)["w"], torch.zeros(SIZE))


def test_a_change_of_a_dtensor_is_found(
    saves: BackgroundSaves, folder: CheckpointFolder, as_late_as_possible: threading.Event
) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = torch.nn.Parameter(distribute_tensor(torch.zeros(300, 100), mesh, [Shard(0)]))
        saves.save(1, {"w": weight}, steady=[weight])
        saves.staged()
        weight.detach().add_(1)
        as_late_as_possible.set()
        saves.wait()
        assert torch.equal(folder.load(1)["w"], torch.zeros(300, 100))
        as_late_as_possible.clear()
        saves.save(2, {"w": weight}, steady=[weight])
        with torch.no_grad():
            weight[5:6].mul_(3)  # counted by the DTensor alone, and few elements are looked at
        saves.staged()
        as_late_as_possible.set()
        with pytest.raises(CheckpointError, match="tensor 'w' was changed while it was being saved"):
            saves.wait()
    finally:
        dist.destroy_process_group()
    assert folder.steps() == [1]


STATES = st.lists(
    st.sampled_from(["save", "update", "data update", "fused update", "forward", "look", "wait", "new memory"]),
    min_size=1,
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(STATES, st.booleans())
def test_any_interleaving_saves_the_state_of_its_moment(
    tmp_path_factory: pytest.TempPathFactory, actions: list[str], slow: bool
) -> None:
    folder = CheckpointFolder(tmp_path_factory.mktemp("any"))
    with pytest.MonkeyPatch.context() as patch:
        if slow:  # nothing is copied before it has to be
            copied = threading.Event()
            finish, complete = LateCopies.finish, LateCopies.complete
            patch.setattr(LateCopies, "finish", lambda self: (finish(self), copied.set()))
            patch.setattr(LateCopies, "complete", lambda self: (copied.wait(20), copied.clear(), complete(self)))
        saves = BackgroundSaves(folder)
        weight = torch.nn.Parameter(torch.zeros(SIZE))
        mean, statistics = torch.zeros(SIZE), torch.zeros(SIZE)
        expected: dict[int, Any] = {}
        pending = False

        def settled() -> None:
            nonlocal pending
            if pending:
                saves.staged()
            pending = False

        for number, action in enumerate(actions):
            if action == "save":
                settled()
                tree = {"model": {"w": weight, "statistics": statistics}, "optimizer": {"w": mean}, "step": number}
                expected[number] = clone(tree)
                saves.save(number, tree, steady=[weight, mean])
                pending = True
            elif action == "forward":
                statistics += 1
            elif action == "wait":
                settled()
                saves.wait()
            elif action == "look":
                saves.poll()
            else:
                settled()
                if action == "new memory":
                    weight, mean = torch.nn.Parameter(weight.detach() + 1), mean + 1
                elif action == "fused update":
                    fused_adamw(weight)
                elif action == "data update":
                    weight.data.add_(1)
                else:
                    weight.detach().add_(number + 1)
                    mean.add_(number + 1)
        settled()
        saves.close()
    assert folder.steps() == sorted(expected)
    for step, tree in expected.items():
        found = folder.load(step)
        assert found["step"] == step
        for part, name in (("model", "w"), ("model", "statistics"), ("optimizer", "w")):
            assert torch.equal(found[part][name], tree[part][name]), (step, part, name)
    folder.close()


def test_a_change_at_one_rank_fails_the_save_of_all(tmp_path: Path, as_late_as_possible: threading.Event) -> None:
    rows = 100
    layout = Layout.of(
        {"m/w": ((4 * rows, 300), "F32")}, [("m/w", rank(r), Region((rows * r, 0), (rows, 300))) for r in range(4)]
    )
    barrier = threading.Barrier(4)

    def work(c: Threads) -> None:
        saves = BackgroundSaves(CheckpointFolder(tmp_path, coordinator=c))
        mine = torch.full((rows, 300), float(c.rank))
        try:
            for step in (1, 2, 3):
                saves.save(step, {"m": {"w": mine}}, layout, steady=[mine])
                if step == 3 and c.rank == 2:
                    mine.add_(1)
                saves.staged()
                mine += 10
                barrier.wait(20)
                as_late_as_possible.set()
                saves.wait()
                if barrier.wait(20) == 0:
                    as_late_as_possible.clear()
                barrier.wait(20)
        finally:
            saves._thread.shutdown()

    found = outcomes(4, work)
    assert [type(error) for error in found] == [CheckpointError] * 4
    assert str(found[2]).startswith("tensor 'm/w' was changed while it was being saved")
    assert all(str(found[number]).startswith("rank 2: tensor 'm/w' was changed") for number in (0, 1, 3))
    folder = CheckpointFolder(tmp_path)
    assert folder.steps() == [1, 2]
    for step in (1, 2):
        whole = torch.arange(4.0).repeat_interleave(rows)[:, None].expand(-1, 300) + 10 * (step - 1)
        assert torch.equal(folder.load(step)["m"]["w"], whole)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_the_order_of_rows_is_found_where_there_are_no_gaps(sizes: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(sizes))))
    tensor = torch.arange(float(np.prod(sizes))).reshape(sizes).permute(order)
    found = row_order(tensor)
    assert found is not None
    assert torch.equal(tensor.permute(found).reshape(-1), torch.arange(float(tensor.numel())))
    assert tensor.permute(found).reshape(-1).data_ptr() == tensor.data_ptr()
    wide = torch.empty(*sizes, 3)[..., 1]
    assert (row_order(wide) is None) == (wide.numel() > 1)
    if max(sizes) > 1:
        assert row_order(tensor[..., None].expand(*tensor.shape, 2)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_state_is_copied_beside_what_the_stream_does(
    saves: BackgroundSaves, folder: CheckpointFolder, same_bits: Same
) -> None:
    weight = torch.nn.Parameter(torch.randn(4000, 4000, device="cuda"))
    image = torch.randn(64, 64, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    statistics = torch.zeros(4_000_000, device="cuda")
    for step in range(4):
        tree = {"m": {"w": weight, "image": image, "statistics": statistics}}
        before = {name: tensor.detach().cpu() for name, tensor in tree["m"].items()}
        torch.cuda._sleep(50_000_000)  # the stream is busy: nothing is copied yet when `save` returns
        saves.save(step, tree, steady=[weight, image])
        statistics += 1
        product = weight @ weight
        saves.staged()
        weight.data.lerp_(product, 0.1)
        image.zero_()
        image += step
        saves.wait()
        found = folder.load(step)["m"]
        assert all(same_bits(found[name], value) for name, value in before.items()), step
    assert saves._staging._memory.is_pinned()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tensor_that_changes_too_early_fails_the_save_by_name(
    saves: BackgroundSaves, folder: CheckpointFolder, as_late_as_possible: threading.Event
) -> None:
    weight = torch.ones(4_000_000, device="cuda")
    saves.save(1, {"w": weight}, steady=[weight])
    weight += 1
    saves.staged()
    as_late_as_possible.set()
    with pytest.raises(CheckpointError, match="tensor 'w' was changed while it was being saved"):
        saves.wait()
    assert folder.steps() == []
