"""The decay of masked weights: its ramp, its sign, its place in AdamW and SGD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from resilin.config import SettingsError, parse_settings
from resilin.models.linear import Linear
from resilin.nouns import Optimizer
from resilin.optim.adamw import AdamW
from resilin.optim.groups import Rule
from resilin.optim.schedule import Constant
from resilin.optim.sgd import SGD
from resilin.sparsity.adamw import SparseAdamW
from resilin.sparsity.decay import MaskDecay, Ramp
from resilin.sparsity.linear import SparseLinear
from resilin.sparsity.settings import SparsityError

FLAT = Constant(warmup=0)
COMMON: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "schedule": FLAT}


def net(n: int = 2, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    linears = [Linear(8, 6, dtype=dtype), Linear(6, 3, dtype=dtype)]
    with torch.no_grad():
        for linear in linears:
            for p in linear.parameters():
                p.normal_(generator=generator)
    return nn.Sequential(SparseLinear(linears[0], n=n, m=4), linears[1])


def set_grads(model: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def train(model: nn.Sequential, optimizer: Optimizer, steps: int = 8, scale: float = 1.0) -> list[Tensor]:
    for step in range(steps):
        set_grads(model, step, scale)
        optimizer.step(step)
    return [p.detach().clone() for p in model.parameters()]


@given(maximum=st.floats(0, 1), length=st.one_of(st.integers(0, 90), st.floats(0, 1)), total=st.integers(1, 100))
def test_the_ramp_starts_at_zero_is_straight_and_continuous_at_its_end(maximum: float, length: Any, total: int) -> None:
    ramp = Ramp(maximum=maximum, steps=length)
    end = length if isinstance(length, int) else round(length * total)
    if end:
        assert ramp.at(0, total) == 0
        assert ramp.at(end, total) == maximum
        slopes = [ramp.at(t + 1, total) - ramp.at(t, total) for t in range(end)]
        assert max(slopes) - min(slopes) <= 1e-12
    assert all(ramp.at(t, total) == maximum for t in range(end, end + 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_decay_it_is_adamw_to_the_bit(dtype: torch.dtype) -> None:
    for n in (2, 4):
        ours, theirs = net(n, dtype), net(n, dtype)
        found = train(ours, SparseAdamW(**COMMON, ramp=Ramp(maximum=0)).build(ours, 8))
        expected = train(theirs, AdamW(**COMMON).build(theirs, 8))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_kept_weights_follow_adamw_whatever_the_masked_ones_do() -> None:
    ours, theirs = net(), net()
    kept = ours[0].mask
    found = train(ours, SparseAdamW(**COMMON, ramp=Ramp(maximum=0.5, steps=0)).build(ours, 8))
    expected = train(theirs, AdamW(**COMMON).build(theirs, 8))
    torch.testing.assert_close(found[0][kept], expected[0][kept], rtol=1e-12, atol=0)
    assert (found[0][~kept] - expected[0][~kept]).abs().min() > 1e-6
    assert all(torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("second_moment", ["gradient", "update"])
def test_the_update_is_that_of_the_formula(second_moment: Any) -> None:
    model = net()
    settings = SparseAdamW(**COMMON, betas=(0.8, 0.9), ramp=Ramp(maximum=0.3, steps=4), second_moment=second_moment)
    optimizer = settings.build(model, 6)
    weight = model[0].weight.detach().clone()
    gone = (~model[0].mask).double()
    mom = square = torch.zeros_like(weight)
    for t in range(6):
        set_grads(model, t)
        g, strength = model[0].weight.grad.clone(), 0.3 * min(t / 4, 1)
        optimizer.step(t)
        weight = weight * (1 - 0.01 * 0.1)
        mom = 0.8 * mom + 0.2 * g
        decay = strength * gone * weight
        seen = mom + decay if second_moment == "update" else g + decay
        square = 0.9 * square + 0.1 * seen**2
        root = square.sqrt() / (1 - 0.9 ** (t + 1)) ** 0.5 + 1e-8
        weight = weight - 0.01 / (1 - 0.8 ** (t + 1)) * (mom + decay) / root
        torch.testing.assert_close(model[0].weight.detach(), weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        SparseAdamW(lr=1e-3, weight_decay=0, schedule=FLAT, ramp=Ramp(maximum=0.1, steps=0)),
        SparseAdamW(lr=1e-3, weight_decay=0, schedule=FLAT, ramp=Ramp(maximum=0.1, steps=0), second_moment="update"),
        MaskDecay(ramp=Ramp(maximum=0.1, steps=0), optimizer={"lr": 1e-3, "weight_decay": 0, "schedule": FLAT}),
        MaskDecay(ramp=Ramp(maximum=1.0, steps=0), optimizer=SGD(lr=0.05, momentum=0, schedule=FLAT)),
    ],
)
def test_a_masked_weight_without_gradient_falls_steadily_to_zero_and_kept_ones_stay(settings: Any) -> None:
    model = net()
    optimizer = settings.build(model, 10_000)
    before, gone = model[0].weight.detach().clone(), ~model[0].mask
    sizes = []
    for step in range(60):
        set_grads(model, step, scale=0.0)
        optimizer.step(step)
        sizes.append(model[0].weight.detach().abs()[gone])
    assert torch.equal(model[0].weight.detach()[~gone], before[~gone])
    path = torch.stack([before.abs()[gone], *sizes])
    # AdamW's step is about lr, whatever is left: it overshoots zero, by more where the decay is in the momentum.
    large = path[:-1] > 2e-2
    assert (path[1:][large] < path[:-1][large]).all()
    assert (path[-1] <= 0.99 * path[0]).all()


def test_sgd_with_the_decay_is_the_formula_of_sr_ste() -> None:
    model = net()
    weight, gone = model[0].weight.detach().clone(), (~model[0].mask).double()
    optimizer = MaskDecay(
        ramp=Ramp(maximum=0.2, steps=2), optimizer=SGD(lr=0.1, momentum=0, schedule=FLAT)
    ).build(model, 5)  # fmt: skip
    for t in range(5):
        set_grads(model, t)
        g = model[0].weight.grad.clone()
        assert optimizer.step(t)["mask_decay"] == 0.2 * min(t / 2, 1)
        weight = weight - 0.1 * (g + 0.2 * min(t / 2, 1) * gone * weight)
        torch.testing.assert_close(model[0].weight.detach(), weight, rtol=1e-12, atol=1e-12)


def test_the_llama_form_is_adamw_of_gradients_with_the_decay() -> None:
    ours, theirs = net(), net()
    optimizer = MaskDecay(ramp=Ramp(maximum=0.2, steps=0), optimizer=AdamW(**COMMON)).build(ours, 6)
    plain = AdamW(**COMMON).build(theirs, 6)
    gone = (~ours[0].mask).double()
    for t in range(6):
        set_grads(ours, t)
        set_grads(theirs, t)
        theirs[0].weight.grad += 0.2 * gone * theirs[0].weight.detach()
        optimizer.step(t)
        plain.step(t)
    torch.testing.assert_close(ours[0].weight, theirs[0].weight, rtol=1e-12, atol=0)


def test_weight_decay_can_spare_masked_weights() -> None:
    model = net()
    before, gone = model[0].weight.detach().clone(), ~model[0].mask
    optimizer = SparseAdamW(**COMMON, ramp=Ramp(maximum=0), decay_masked=False).build(model, 3)
    set_grads(model, 0, scale=0.0)
    optimizer.step(0)
    assert torch.equal(model[0].weight.detach()[gone], before[gone])
    torch.testing.assert_close(model[0].weight.detach()[~gone], 0.999 * before[~gone])


def test_rules_and_records_reach_masked_matrices() -> None:
    model = net()
    settings = SparseAdamW(**COMMON, ramp=Ramp(maximum=0.1, steps=0), rules=(Rule(match="0.weight", lr_scale=2.0),),
                           record=("update_rms",))  # fmt: skip
    optimizer = settings.build(model, 4)
    before = model[0].weight.detach().clone()
    set_grads(model, 0)
    logs = optimizer.step(0)
    moved = (model[0].weight.detach() - before * (1 - 0.002)) / 0.02
    assert logs["update_rms/0.weight"] == pytest.approx(float(moved.square().mean().sqrt()))
    assert set(optimizer.state_dict()["parameters"]) == {n for n, _ in model.named_parameters()}


def test_a_model_without_masks_is_refused() -> None:
    for settings in (SparseAdamW(), MaskDecay()):
        with pytest.raises(SparsityError, match=r"resilin\.sparsity\.settings:Sparse"):
            settings.build(nn.Linear(4, 4), 3)
    with pytest.raises(SettingsError, match=r"ramp\.maximum"):
        parse_settings(SparseAdamW, {"ramp": {"maximum": -1}}, "x.toml")
