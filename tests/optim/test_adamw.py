from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resilin.config import SettingsError, parse_settings
from resilin.nouns import Optimizer
from resilin.optim.adamw import AdamW
from resilin.optim.schedule import Constant, Cosine, Linear, Schedule, WarmupStableDecay

FLAT = Constant(warmup=0)
SCHEDULES: list[Schedule] = [FLAT, Cosine(warmup=3, min_lr=1e-5), Linear(warmup=0.3), WarmupStableDecay(warmup=2)]


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False)).to(dtype)


def set_grads(model: nn.Module, step: int, scale: float = 1.0) -> None:
    g = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=g, dtype=p.dtype)


def train(model: nn.Module, steps: int = 8, scale: float = 1.0, **fields: Any) -> list[Tensor]:
    optimizer = AdamW(**fields).build(model, steps)
    for step in range(steps):
        set_grads(model, step, scale)
        optimizer.step(step)
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def test_coupled_decay_is_torch_s_adamw_to_the_bit() -> None:
    model = net(dtype=torch.float32)
    reference = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(8):
        set_grads(model, step)
        reference.step()
    expected = [p.detach().clone() for p in model.parameters()]
    found = train(
        net(dtype=torch.float32), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, decay_vectors=True, schedule=FLAT
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@settings(deadline=None, max_examples=25)
@given(
    lr=st.floats(1e-6, 1.0),
    decay=st.floats(0, 0.5),
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 12),
)
def test_with_zero_gradient_independent_decay_shrinks_by_the_schedule_alone(
    lr: float, decay: float, schedule: Schedule, steps: int
) -> None:
    if (schedule.min_lr or 0) > lr:
        return
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    after = train(
        model, steps, 0.0, lr=lr, weight_decay=decay, decay="independent", schedule=schedule, decay_vectors=True
    )
    shrink = math.prod(1 - schedule.factor(t, steps, lr) * decay for t in range(steps))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(b, a * shrink, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=25)
@given(lr=st.floats(1e-4, 1.0), decay=st.floats(1e-6, 0.1), schedule=st.sampled_from(SCHEDULES))
def test_coupled_decay_of_lambda_over_lr_follows_the_trajectory_of_independent_decay(
    lr: float, decay: float, schedule: Schedule
) -> None:
    independent = train(net(), lr=lr, weight_decay=decay, decay="independent", schedule=schedule)
    coupled = train(net(), lr=lr, weight_decay=decay / lr, decay="coupled", schedule=schedule)
    for a, b in zip(independent, coupled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("decay", ["coupled", "independent"])
def test_each_step_is_the_written_formula(schedule: Schedule, decay: str) -> None:
    lr, lam, (b1, b2), eps, steps = 0.03, 0.02, (0.8, 0.95), 1e-6, 10
    model = net()
    theta = [p.detach().clone() for p in model.parameters()]
    m, u = [torch.zeros_like(x) for x in theta], [torch.zeros_like(x) for x in theta]
    for t in range(steps):
        set_grads(model, t)
        s = schedule.factor(t, steps, lr)
        for i, p in enumerate(model.parameters()):
            assert p.grad is not None
            m[i] = b1 * m[i] + (1 - b1) * p.grad
            u[i] = b2 * u[i] + (1 - b2) * p.grad**2
            delta = (m[i] / (1 - b1 ** (t + 1))) / ((u[i] / (1 - b2 ** (t + 1))).sqrt() + eps)
            wd = lam * theta[i] * (p.ndim > 1)
            theta[i] = theta[i] - s * (lr * delta + wd if decay == "independent" else lr * (delta + wd))
    found = train(net(), steps, lr=lr, weight_decay=lam, betas=(b1, b2), eps=eps, decay=decay, schedule=schedule)
    for a, b in zip(found, theta, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(rms=st.floats(-12, 2).map(lambda e: 10.0**e), eps=st.sampled_from([1e-6, 1e-8, 1e-15]))
def test_a_constant_gradient_s_first_step_is_cut_to_rms_over_rms_plus_eps(rms: float, eps: float) -> None:
    parameter = nn.Parameter(torch.zeros(7, dtype=torch.float64))
    model = nn.ParameterList([parameter])
    optimizer = AdamW(lr=1.0, eps=eps, weight_decay=0.0, schedule=FLAT, record=("update_rms",)).build(model, 1)
    parameter.grad = torch.full_like(parameter, rms)
    logs = optimizer.step(0)
    expected = rms / (rms + eps)
    torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, -expected), rtol=1e-9, atol=0)
    assert logs["update_rms"] == pytest.approx(expected, rel=1e-6)


def test_a_small_eps_still_moves_where_gradients_are_tiny_in_float32() -> None:
    def moved(eps: float) -> float:
        return float(train(net(dtype=torch.float32), 3, 1e-10, lr=0.1, eps=eps, schedule=FLAT)[0].abs().mean())

    start = float(next(net(dtype=torch.float32).parameters()).detach().abs().mean())
    assert abs(moved(1e-8) - start) < 0.1 * abs(moved(1e-15) - start)


def test_recorded_update_rms_is_the_step_taken_divided_by_the_learning_rate() -> None:
    model = net()
    optimizer = AdamW(
        lr=0.02, weight_decay=0.0, schedule=Linear(warmup=2), record=("update_rms", "parameter_rms"), record_every=3
    ).build(model, 9)
    for step in range(9):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        set_grads(model, step)
        logs = optimizer.step(step)
        if step % 3:
            assert set(logs) == {"lr"}
            continue
        for name, p in model.named_parameters():
            taken = float(((before[name] - p.detach()) / logs["lr"]).square().mean().sqrt())
            assert logs[f"update_rms/{name}"] == pytest.approx(taken, rel=1e-5)
            assert logs[f"parameter_rms/{name}"] == pytest.approx(float(p.detach().square().mean().sqrt()), rel=1e-5)
        everything = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert logs["parameter_rms"] == pytest.approx(float(everything.square().mean().sqrt()), rel=1e-5)


def test_recording_changes_no_bit() -> None:
    plain = train(net(dtype=torch.float32))
    watched = train(net(dtype=torch.float32), record=("update_rms", "parameter_rms"))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_a_parameter_without_gradient_stays_as_it_is() -> None:
    model = net()
    optimizer = AdamW(weight_decay=0.5, decay="independent", decay_vectors=True, schedule=FLAT).build(model, 3)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(0)
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))


def test_a_rule_s_factor_scales_the_step_and_the_coupled_decay_but_not_the_independent_one() -> None:
    def last(decay: str, scale: float, gradient: float) -> Tensor:
        rules = ({"match": "*", "lr_scale": scale},)
        return train(net(), 1, gradient, lr=0.1, weight_decay=0.3, decay=decay, schedule=FLAT, rules=rules)[0]

    start = next(net().parameters()).detach()
    torch.testing.assert_close(last("coupled", 2.0, 0.0), start * (1 - 0.2 * 0.3))
    torch.testing.assert_close(last("independent", 2.0, 0.0), start * (1 - 0.3))
    set_grads(model := net(), 0)
    moved = last("independent", 2.0, 1.0) - start * (1 - 0.3)
    assert model[0].weight.grad is not None
    torch.testing.assert_close(moved, -0.2 * model[0].weight.grad.sign(), rtol=1e-6, atol=1e-6)


def test_it_is_the_optimizer_noun_and_logs_the_scheduled_learning_rate() -> None:
    model = net()
    optimizer = AdamW(lr=0.5, schedule=Linear(warmup=0)).build(model, 10)
    assert isinstance(optimizer, Optimizer)
    set_grads(model, 0)
    assert optimizer.step(5) == {"lr": 0.25}
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("key", "value"), [("lr", 0.0), ("betas", [0.9, 1.0]), ("decay", "couple"), ("eps", -1.0)])
def test_values_out_of_range_are_named(key: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=key):
        parse_settings(AdamW, {key: value}, "x.toml")


@pytest.mark.parametrize("decay", ["coupled", "independent"])
def test_torch_s_adamw_with_the_saved_groups_and_states_takes_the_same_next_step(decay: str) -> None:
    rules = [{"match": "0.weight", "lr_scale": 0.5}]
    fields = {"lr": 0.02, "weight_decay": 0.1 if decay == "coupled" else 0.002, "decay": decay, "schedule": FLAT}
    model = net()
    optimizer = AdamW(**fields, rules=rules, eps=1e-6).build(model, 8)
    for step in range(3):
        set_grads(model, step)
        optimizer.step(step)
    saved = optimizer.state_dict()
    other = net()
    other.load_state_dict(model.state_dict())
    named = dict(other.named_parameters())
    groups = [{**group, "params": [named[name] for name in group["parameters"]]} for group in saved["groups"]]
    theirs = torch.optim.AdamW(groups)
    for name, moments in saved["parameters"].items():
        theirs.state[named[name]] = {key: tensor.clone() for key, tensor in moments.items()}
    set_grads(model, 3)
    set_grads(other, 3)
    optimizer.step(3)
    theirs.step()
    for ours, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)
    assert sorted(name for group in saved["groups"] for name in group["parameters"]) == sorted(named)
