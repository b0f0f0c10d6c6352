from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import tiered_runs
import torch
from tiered_runs import LAYERS, MOE, RULE, TOTAL, InMemory, Stack, Tiered, batches

from resilin.config import UserError
from resilin.memory import ExpertTiers, MoESize, TieredExperts, plan_capacity
from resilin.memory.expert_state import ExpertShape, Record
from resilin.optim.adamw import AdamW
from resilin.optim.muon import Muon

STEPS = 6


def same(mine, theirs) -> list[str]:
    assert mine.keys() == theirs.keys()
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


@pytest.fixture(scope="module", params=[True, False], ids=["gated", "plain"])
def in_memory(request):
    run = InMemory(request.param)
    losses = [run.step(step) for step in range(STEPS)]
    assert sum(n < STEPS for n in run.visits.values()) > 5, "the test needs experts that are left alone"
    return request.param, losses, run.states()


@pytest.mark.parametrize(
    "options",
    [
        {"host": 1},
        {"host": 1, "prefetch": False, "device_layers": 1},
        {"host": 2},
        {"host": 2, "policy": "lru"},
        {"host": 5, "threshold": 2.0, "period": 3},
        {"host": 9, "prefetch": False},
        {"host": 1000},
    ],
    ids=str,
)
def test_training_with_tiers_is_that_in_memory_to_the_bit(in_memory, tmp_path, options):
    gated, losses, states = in_memory
    run = Tiered(tmp_path, gated, **options)
    assert [run.step(step) for step in range(STEPS)] == losses
    assert same(run.states(), states) == []
    report = run.tiers.report()
    if options["host"] == 1000:
        assert report.read_bytes == LAYERS * MOE.experts * run.tiers.record.record_bytes  # each once
    run.tiers.close()


def test_what_was_written_back_is_gone_on_from(in_memory, tmp_path):
    gated, losses, states = in_memory
    first = Tiered(tmp_path, gated)
    assert [first.step(step) for step in range(3)] == losses[:3]
    first.tiers.write_back()
    weights = {name: tensor for name, tensor in first.model.state_dict().items() if ".experts." not in name}
    dense = copy.deepcopy((weights, first.optimizer.state_dict()))
    first.step(3)  # lost
    first.tiers.close()
    second = Tiered(tmp_path, gated, host=4)
    assert second.tiers.steps == 3
    second.model.load_state_dict(dense[0], strict=False)
    second.optimizer.load_state_dict(dense[1])
    assert [second.step(step) for step in range(3, STEPS)] == losses[3:]
    assert same(second.states(), states) == []
    second.tiers.close()


@pytest.mark.parametrize("last", [4, 7])
def test_a_killed_process_leaves_the_last_step_that_was_written_back(tmp_path, last):
    command = [sys.executable, tiered_runs.__file__, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == last:
                break
        process.kill()
    again = Tiered(tmp_path, host=3)
    assert again.tiers.steps >= last // 3 * 3
    assert again.tiers.steps % 3 == 0
    wanted = InMemory()
    for step in range(again.tiers.steps):
        wanted.step(step)
    assert same(again.states(), wanted.states()) == []
    again.tiers.close()


def test_no_matrix_stays_on_the_device_between_forward_and_backward(tmp_path):
    run = Tiered(tmp_path, device_layers=1)
    out, _ = run.model(batches(0)[0][0])
    held = run.tiers._loans.bytes
    assert held <= 4 * 4 * run.tiers.record.parameters  # of one layer, for two tokens of two choices
    kept = [t for t in _saved(out) if t.ndim == 3 and t.shape[1:] in ((16, 16),)]
    assert kept == []
    run.tiers.close()


def _saved(out: torch.Tensor) -> list[torch.Tensor]:
    """What the graph itself keeps of stacked matrices: nothing but packed names."""
    found, stack, seen = [], [out.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [value for name in dir(node) if name.startswith("_saved_") for value in [getattr(node, name)]
                  if isinstance(value, torch.Tensor)]  # fmt: skip
        stack += [parent for parent, _ in node.next_functions]
    return found


def test_evaluation_neither_counts_nor_trains(tmp_path):
    run = Tiered(tmp_path)
    with torch.no_grad():
        run.model(batches(0)[0][0])
    assert run.tiers.gradients() == {}
    before = run.states()
    run.tiers.step(0)
    assert same(before, run.states()) == []
    run.tiers.close()


def test_matrices_that_are_updated_whole_are_so_here_too(tmp_path):
    rule = Muon(lr=0.02)
    models = [Stack(), Stack()]
    plain = rule.build(models[0], TOTAL)
    tiers = TieredExperts(models[1], tmp_path, ExpertTiers(host_bytes=10_000), rule, TOTAL)
    for step in range(3):
        for model in models:
            for x, y in batches(step):
                (model(x)[0] - y).square().sum().backward()
        for name, parameter in models[0].named_parameters():
            if ".experts." not in name:
                parameter.grad = None  # the rest stays as it is in both
        plain.step(step)
        tiers.step(step)
        models[0].zero_grad()
        models[1].zero_grad()
    for name, stack in tiers.stacked(1).items():
        if "." not in name:
            torch.testing.assert_close(stack, getattr(models[0].layers[1].experts, name).detach(), rtol=1e-4, atol=1e-6)
    tiers.close()


def test_planned_bytes_are_those_that_are_used(tmp_path):
    everything = LAYERS * MOE.experts
    run = Tiered(tmp_path, host=everything)
    for step in range(2):
        out, used = run.model(torch.randn(1, 64, 16))
        assert all(len(experts) == MOE.experts for experts in used)
        out.square().sum().backward()
        run.tiers.step(step)
    report, room = run.tiers.report(), 1 << 30
    size = MoESize(0, LAYERS, MOE.experts, run.tiers.record)
    plan = plan_capacity(size, device=room, host=room, disk=room, alpha=report.active)
    files = sum(path.stat().st_size for path in tmp_path.glob("layer-*"))
    assert report.active == 1
    assert plan.disk.needed == files == report.disk_bytes
    assert plan.host.needed == pytest.approx(report.host_bytes + report.gradient_bytes, rel=0.05)
    assert plan.device.needed == pytest.approx(report.device_bytes, rel=0.05)
    run.tiers.close()


@pytest.mark.parametrize("host", [1, 2, 6])
def test_host_memory_is_that_of_the_cache_and_two_states_more(tmp_path, host):
    run = Tiered(tmp_path, host=host)
    for step in range(STEPS):
        run.step(step)
    assert run.tiers.report().host_bytes <= (host + 2) * run.tiers.record.record_bytes
    run.tiers.close()


@pytest.mark.parametrize(("tier", "binding"), [("device", "device"), ("host", "host"), ("disk", "disk")])
def test_the_tier_with_least_room_is_named(tier, binding):
    shape = Record(ExpertShape(64, 128, True))
    size = MoESize(10**6, 4, 16, shape)
    room = {"device": 10**10, "host": 10**10, "disk": 10**10} | {tier: 25 * 10**6}
    plan = plan_capacity(size, **room, alpha=1.0)
    assert plan.binding.name == binding
    assert not plan.fits or plan.most_experts >= 16
    fits = plan_capacity(replace(size, experts=plan.most_experts), **room, alpha=1.0)
    more = plan_capacity(replace(size, experts=plan.most_experts + 1), **room, alpha=1.0)
    assert fits.fits
    assert not more.fits
    with pytest.raises(ValueError, match=f"the {binding} needs"):
        more.check()


def test_impossible_tiers_are_refused(tmp_path):
    with pytest.raises(UserError, match="less than the state of one expert"):
        TieredExperts(Stack(), tmp_path, ExpertTiers(host_bytes=10), RULE, TOTAL)
    with pytest.raises(UserError, match=r"set model\.moe"):
        TieredExperts(torch.nn.Linear(2, 2), tmp_path, ExpertTiers(), RULE, TOTAL)
    unlike = Stack()
    unlike.layers[1].experts.requires_grad_(False)
    with pytest.raises(UserError, match="7 of 16 x 16, frozen; 7 of 16 x 16, trained"):
        TieredExperts(unlike, tmp_path, ExpertTiers(), RULE, TOTAL)
    with pytest.raises(UserError, match=r"optimizer\.record needs all elements"):
        TieredExperts(Stack(), tmp_path, ExpertTiers(), AdamW(record=("update_rms",)), TOTAL)
    with pytest.raises(ValueError, match="not even one expert a layer fits: disk"):
        plan_capacity(MoESize(0, 1, 1, Record(ExpertShape(8, 8, True))), device=10**9, host=10**9, disk=5, alpha=0.5)
