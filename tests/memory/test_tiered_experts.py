from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import tiered_runs
import torch
from tiered_runs import LAYERS, LR, MOE, InMemory, Stack, Tiered, batches

from resilin.memory import MoESize, TieredExperts, TierSettings, plan_capacity
from resilin.memory.expert_state import ExpertShape, ExpertState, LazyAdamW

STEPS = 6


def same(mine, theirs) -> list[str]:
    assert mine.keys() == theirs.keys()
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


@pytest.fixture(scope="module", params=[True, False], ids=["gated", "plain"])
def in_memory(request):
    run = InMemory(request.param)
    losses = [run.step(step) for step in range(STEPS)]
    untouched = sum(int(run.states()[f"{layer}.{e}.updates"]) < STEPS for layer in range(LAYERS) for e in range(7))
    assert untouched > 5, "the test needs experts that are left alone"
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
        assert report.read_bytes == LAYERS * MOE.experts * run.tiers.shape.record_bytes  # each once
    run.tiers.close()


def test_what_was_written_back_is_gone_on_from(in_memory, tmp_path):
    gated, losses, states = in_memory
    first = Tiered(tmp_path, gated)
    assert [first.step(step) for step in range(3)] == losses[:3]
    first.tiers.write_back()
    dense = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict()))
    first.step(3)  # lost
    first.tiers.close()
    second = Tiered(tmp_path, gated, host=4)
    assert second.tiers.steps == 3
    second.model.load_state_dict(dense[0])
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
    held = sum(matrix.nbytes for loan in run.tiers._loans.values() for matrix in loan.values())
    assert held <= 4 * 4 * run.tiers.shape.parameters  # of one layer, for two tokens of two choices
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
    run.tiers.step(LR)
    assert same(before, run.states()) == []
    run.tiers.close()


def test_catching_up_decays_moments_and_weights_as_often_as_was_skipped():
    shape = ExpertShape(8, 4, True)
    record = torch.zeros(shape.record_bytes, dtype=torch.uint8)
    state = ExpertState.of(record, shape)
    state.weights_P.normal_(generator=torch.Generator().manual_seed(0))
    grads = [torch.randn(shape.parameters, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    rates = [0.1, 0.2, 0.3, 0.05]
    lazy, eager = LazyAdamW(weight_decay=0.5), LazyAdamW(weight_decay=0.5, catch_up=True)
    logs = [sum(eager.log_decay(lr) for lr in rates[:step]) for step in range(4)]
    plain = torch.optim.AdamW([w := torch.nn.Parameter(state.weights_P.clone())], betas=(0.9, 0.95), weight_decay=0.5)
    untouched = record.clone()
    for step, grad in ((0, grads[0]), (3, grads[1])):
        eager.update(state, grad, step, rates[step], logs[step])
        lazy.update(ExpertState.of(untouched, shape), grad, step, rates[step], logs[step])
    for step, lr in enumerate(rates):
        plain.param_groups[0]["lr"] = lr
        w.grad = grads[0] if step == 0 else grads[1] if step == 3 else torch.zeros_like(w)
        plain.step()
    kept = plain.state[w]
    torch.testing.assert_close(state.exp_avg_P, kept["exp_avg"])
    torch.testing.assert_close(state.exp_avg_sq_P, kept["exp_avg_sq"])
    assert float(state.counters[0]) == 4
    left_alone = ExpertState.of(untouched, shape)
    assert float(left_alone.counters[0]) == 2
    assert not torch.allclose(left_alone.exp_avg_P, state.exp_avg_P)


def test_planned_bytes_are_those_that_are_used(tmp_path):
    everything = LAYERS * MOE.experts
    run = Tiered(tmp_path, host=everything)
    for _ in range(2):
        out, used = run.model(torch.randn(1, 64, 16))
        assert all(len(experts) == MOE.experts for experts in used)
        out.square().sum().backward()
        run.tiers.step(LR)
    report, room = run.tiers.report(), 1 << 30
    size = MoESize(0, LAYERS, MOE.experts, run.tiers.shape)
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
    assert run.tiers.report().host_bytes <= (host + 2) * run.tiers.shape.record_bytes
    run.tiers.close()


@pytest.mark.parametrize(("tier", "binding"), [("device", "device"), ("host", "host"), ("disk", "disk")])
def test_the_tier_with_least_room_is_named(tier, binding):
    shape = ExpertShape(64, 128, True)
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
    with pytest.raises(ValueError, match="less than one expert's"):
        TieredExperts(Stack(), TierSettings(tmp_path, host_bytes=10), LazyAdamW())
    with pytest.raises(ValueError, match="none"):
        TieredExperts(torch.nn.Linear(2, 2), TierSettings(tmp_path), LazyAdamW())
    with pytest.raises(ValueError, match="not even one expert a layer fits: disk"):
        plan_capacity(MoESize(0, 1, 1, ExpertShape(8, 8, True)), device=10**9, host=10**9, disk=5, alpha=0.5)
