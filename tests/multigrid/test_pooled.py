"""Batch norm over several processes: real ones, connected by gloo."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from torch import nn

from resilin.multigrid.norms import PreciseStatistics, replace_norms
from resilin.multigrid.pooled import pool_of, pool_size
from resilin.multigrid.schedule import GridSchedule, Plan
from resilin.multigrid.source import MultigridSource
from resilin.multigrid.sub_batch_norm import SubBatchNorm
from resilin.nouns import Batch
from resilin.vision.grid import Grid


class Images:
    """Random images, the same for everyone who asks."""

    grid = Grid(size=8)

    def resampled(self, grid: Grid) -> Images:
        other = copy.copy(self)
        other.grid = grid
        return other

    def slots(self, step: int) -> int:
        return 8

    def fetch(self, step: int, slots: Any) -> Batch:
        size = self.grid.size
        x = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(step)) * 3 + 1
        return Batch(torch.tensor(list(slots)), {"inputs": x[list(slots)]})


def source() -> Any:
    """Batches of 8 and 16: sizes 6 and 8."""
    return MultigridSource(Images(), GridSchedule(Plan(Grid(size=8), 40, (20, 30), 1.0)), 8)


def model_and_view(base: int, step: int) -> tuple[nn.Module, Any]:
    """A model with a sub-batch norm and what a listener sees at a step."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    replace_norms(model, base)
    model.add_module("precise_statistics", PreciseStatistics(3))
    return model, SimpleNamespace(source=source(), model=model, step=step, autocast=nullcontext)


def listeners(model: nn.Module, hook: str, view: Any) -> None:
    for module in model.modules():
        if hasattr(module, hook):
            getattr(module, hook)(view)


def union(shape: tuple[int, ...]) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randn(shape, dtype=torch.float64) * 2 + 7


def pooled_is_batch_norm_over_the_union(rank: int) -> None:
    bounds = {2: [0, 3, 8], 4: [0, 1, 4, 6, 12]}[dist.get_world_size()]
    x, weight = union((bounds[-1], 3, 4, 5)), union((bounds[-1], 3, 4, 5)).sin()
    whole, one = nn.BatchNorm2d(3).double(), SubBatchNorm(3).double()
    one.load_state_dict(whole.state_dict())
    one.pool = dist.get_world_size()
    wanted = x.clone().requires_grad_()
    out = whole(wanted)
    (out * weight).sum().backward()
    mine = slice(bounds[rank], bounds[rank + 1])
    part = x[mine].clone().requires_grad_()
    ours = one(part)
    (ours * weight[mine]).sum().backward()
    assert torch.allclose(ours, out[mine], atol=1e-9)
    assert wanted.grad is not None
    assert part.grad is not None
    assert torch.allclose(part.grad, wanted.grad[mine], atol=1e-9)
    for name in ("weight", "bias"):
        total = getattr(one, name).grad
        dist.all_reduce(total)
        assert torch.allclose(total, getattr(whole, name).grad, atol=1e-9)
    assert torch.allclose(one.running_mean, whole.running_mean)
    assert torch.allclose(one.running_var, whole.running_var)
    one.eval()
    assert torch.allclose(one(part), whole.eval()(x)[mine]), "evaluation asks nobody"


def a_process_with_few_samples_pools_with_its_neighbours(rank: int) -> None:
    model, view = model_and_view(base=4, step=0)
    norm = next(m for m in model.modules() if isinstance(m, SubBatchNorm))
    seen = []
    for step in (0, view.source.grid_schedule.total - 1):
        view.step = step
        listeners(model, "before_step", view)
        seen.append((norm.splits, norm.pool))
    assert seen == [(1, 1), (1, 2)], "16 samples over 4 processes are 4 each; 8 are 2"
    group = pool_of(2)
    assert group is not None
    assert dist.get_process_group_ranks(group) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert pool_of(2) is group
    x = union((8, 4, 3, 3)).float()
    out = norm.train()(x[2 * rank : 2 * rank + 2])
    halves = [nn.BatchNorm2d(4)(x[:4]), nn.BatchNorm2d(4)(x[4:])]
    with torch.no_grad():
        wanted = (halves[rank // 2] * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1))[2 * (rank % 2) :][:2]
    assert torch.allclose(out, wanted, atol=1e-4)


def measured_statistics_are_those_of_one_process(_rank: int) -> None:
    model, view = model_and_view(base=16, step=5)
    norm = next(m for m in model.modules() if isinstance(m, SubBatchNorm))
    view.step = 4
    listeners(model, "before_step", view)
    view.step = 5
    listeners(model, "before_evaluation", view)
    conv = model[0]  # type: ignore[index]
    assert view.source.base_slots(4, 0) == 16
    outs = [conv(view.source.base_batch(4, number, range(16))["inputs"]) for number in range(3)]
    means = torch.stack([o.mean((0, 2, 3)) for o in outs])
    variances = torch.stack([o.var((0, 2, 3)) for o in outs])
    mean, variance = norm.merged()
    assert torch.allclose(mean, means.mean(0), atol=1e-5)
    assert torch.allclose(variance, variances.mean(0), rtol=1e-4)
    gathered = [torch.empty_like(variance) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, variance.contiguous())
    assert all(torch.equal(g, variance) for g in gathered)


@pytest.mark.parametrize("world", [2, 4])
def test_pooled_statistics_are_those_of_the_union(world: int) -> None:
    run_ranks(world, pooled_is_batch_norm_over_the_union)


def test_neighbours_pool_where_a_process_has_less_than_the_base() -> None:
    run_ranks(4, a_process_with_few_samples_pools_with_its_neighbours)


def test_statistics_measured_by_two_processes_are_those_of_one() -> None:
    run_ranks(2, measured_statistics_are_those_of_one_process)


def test_pools_divide_the_world() -> None:
    assert [pool_size(wanted, 8) for wanted in (0, 1, 2, 3, 5, 8, 9)] == [1, 1, 2, 2, 4, 8, 8]
    assert pool_size(4, 6) == 3


def test_alone_there_is_nothing_to_pool_with() -> None:
    model, view = model_and_view(base=32, step=0)
    listeners(model, "before_step", view)
    norm = next(m for m in model.modules() if isinstance(m, SubBatchNorm))
    assert (norm.splits, norm.pool, pool_of(norm.pool)) == (1, 1, None)
