from __future__ import annotations

import itertools

import pytest
import torch
from forked import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.initial import fill_parameters
from resilin.models.moe import MoE
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.task_allocation import Allocation, TaskAllocator, allocate
from resilin.parallel.task_groups import TaskGroups

UFO = (512.0, 256.0, 128.0, 128.0)
loads = st.lists(st.integers(1, 60), min_size=1, max_size=4)


def brute_force(work, devices: int) -> float:
    """The least bound of all ways to give tasks devices of their own, or to put them on shared ones."""
    if devices < len(work):
        ways = [list(zip(work, way, strict=True)) for way in itertools.product(range(devices), repeat=len(work))]
        return min(max(sum(w for w, at in way if at == device) for device in range(devices)) for way in ways)
    counts = (c for c in itertools.product(range(1, devices + 1), repeat=len(work)) if sum(c) <= devices)
    return min(max(w / n for w, n in zip(work, c, strict=True)) for c in counts)


@settings(max_examples=150, deadline=None)
@given(work=loads, devices=st.integers(1, 12))
def test_no_allocation_has_a_smaller_bound(work, devices):
    plan = allocate(work, devices)
    assert plan.bound(work) == pytest.approx(brute_force(work, devices), rel=1e-12)
    assert plan.size <= devices
    assert sum(plan.loads(work)) == pytest.approx(sum(work))
    assert 0 < plan.utilisation(work) <= 1 + 1e-12


@settings(max_examples=12, deadline=None)
@given(work=st.lists(st.integers(1, 60), min_size=5, max_size=9), devices=st.integers(1, 4))
def test_packing_many_tasks_is_within_its_guarantee(work, devices):
    # Largest first is never worse than 4/3 - 1/(3G) of the best (Graham, 1969), and moves only improve it.
    assert allocate(work, devices).bound(work) <= brute_force(work, devices) * (4 / 3 - 1 / (3 * devices)) + 1e-9


def test_utilisation_is_that_of_the_papers_example_and_not_monotone():
    found = {g: round(allocate(UFO, g).utilisation(UFO), 2) for g in (4, 5, 6, 8, 11)}
    assert found == {4: 0.5, 5: 0.8, 6: 0.67, 8: 1.0, 11: 0.73}
    assert [len(own) for own in allocate(UFO, 8).devices] == [4, 2, 1, 1]


@given(st.integers(0, 40), st.integers(1, 6))
def test_shares_cover_a_tasks_samples_once(samples, devices):
    plan = Allocation((tuple(range(devices)),))
    parts = [plan.share(0, device, samples) for device in range(devices)]
    assert [s for part in parts for s in part] == list(range(samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_both_modes_choose_among_all_numbers_of_devices():
    samples = tuple(map(int, UFO))
    assert TaskAllocator(samples, 4, 12, "cost").current.size == 8
    assert TaskAllocator(samples, 4, 6, "cost").current.size == 5
    fast = TaskAllocator(samples, 4, 12)
    assert fast.current.bound(UFO) == min(allocate(UFO, g).bound(UFO) for g in range(4, 13))


def test_a_plan_is_kept_until_a_change_pays():
    plans = TaskAllocator((100, 100), 4, 4, interval=10, horizon=100, migration_seconds=1.0, smoothing=1.0)
    assert [len(own) for own in plans.current.devices] == [2, 2]
    plans.observe([1.04, 0.96])
    assert plans.replan(10) is None  # nothing better
    plans.observe([3.0, 1.0])
    assert plans.replan(15) is None  # not yet time to look
    plans.migration_seconds = 10**6
    assert plans.replan(20) is None  # better, and not worth the change
    plans.migration_seconds = 1.0
    changed = plans.replan(20)
    assert changed is not None
    assert [len(own) for own in changed.devices] == [3, 1]
    plans.observe([2.9, 1.05])
    assert plans.replan(30) is None
    assert [step for step, _ in plans.history] == [0, 20]


def test_measurements_are_averaged():
    plans = TaskAllocator((10, 10), 2, 2, smoothing=0.5)
    plans.observe([10.0, 20.0])
    assert plans.costs == [1.0, 2.0]
    plans.observe([20.0, 20.0])
    assert plans.costs == [1.5, 2.0]


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="workloads above 0"):
        allocate([1.0, 0.0], 2)
    with pytest.raises(ValueError, match="the first should be"):
        TaskAllocator((1,), 3, 2)
    with pytest.raises(ParallelError, match="is given 1 ranks"):
        TaskGroups(Allocation(((0, 1),)), Group.alone())


SAMPLES, WEIGHTS = (8, 4, 2, 2), (1.0, 2.0, 0.5, 1.0)


class Model(nn.Module):
    """A shared mixture of experts under one head for each task."""

    def __init__(self) -> None:
        super().__init__()
        moe = MoESettings(experts=4, experts_per_token=2, expert_size=12)
        settings = DecoderSettings(hidden_size=16, heads=2, moe=moe, init="fan_in")
        self.trunk = MoE(settings, moe)
        fill_parameters(self.trunk, settings, 0)
        generator = torch.Generator().manual_seed(1)
        self.heads = nn.ParameterList(nn.Parameter(torch.randn(16, generator=generator)) for _ in SAMPLES)

    def loss(self, task: int, samples: range) -> torch.Tensor:
        x = torch.randn(SAMPLES[task], 3, 16, generator=torch.Generator().manual_seed(task))
        x = x[samples.start : samples.stop]
        return WEIGHTS[task] * (self.trunk(x)[0] @ self.heads[task]).square().sum()


def gradients(rank: int, plan: Allocation) -> dict[str, torch.Tensor]:
    model, groups = Model(), TaskGroups(plan, Group.of() if plan.size > 1 else Group.alone())
    for task in groups.tasks:
        model.loss(task, groups.share(task, SAMPLES[task])).backward()
    heads = {task: [head] for task, head in enumerate(model.heads)}
    groups.sum_gradients(list(model.trunk.parameters()), heads, sum(SAMPLES))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("devices", [2, 4, 5, 8])
def test_a_gradient_does_not_depend_on_the_allotment(devices):
    want = gradients(0, allocate(SAMPLES, 1))
    found: dict[str, torch.Tensor] = {}
    for part in run_ranks(devices, gradients, allocate(SAMPLES, devices)):
        for name, grad in part.items():
            torch.testing.assert_close(grad, want[name], rtol=1e-6, atol=1e-6)
            found[name] = grad
    assert found.keys() == want.keys()
