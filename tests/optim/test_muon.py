from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import resilin.optim.muon as muon_module
from resilin.optim.muon import Muon, update_scale
from resilin.optim.newton_schulz import orthogonalise
from resilin.optim.schedule import Constant

FLAT = Constant(warmup=0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 16)
        self.same = nn.Linear(8, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        self.experts = nn.Parameter(torch.randn(3, 8, 16) / 4)
        self.expert_bias = nn.Parameter(torch.zeros(3, 8))
        self.head = nn.Linear(8, 11, bias=False)

    @property
    def head_weight(self) -> Tensor:
        return self.head.weight


def set_grads(model: nn.Module, step: int) -> None:
    g = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)


def trained(settings: Muon, steps: int = 3) -> dict[str, Tensor]:
    model = Net()
    optimizer = settings.build(model, steps)
    for step in range(steps):
        set_grads(model, step)
        optimizer.step(step)
    return {name: p.detach() for name, p in model.named_parameters()}


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 24), n=st.integers(1, 24), scale=st.floats(-6, 6), seed=st.integers(0, 99))
def test_five_iterations_bring_singular_values_near_one_and_keep_the_singular_vectors(
    m: int, n: int, scale: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    r = min(m, n)
    u, _ = torch.linalg.qr(torch.randn(m, r, generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, r, generator=g, dtype=torch.float64))
    values = torch.rand(r, generator=g, dtype=torch.float64) * 0.95 + 0.05  # a condition number of at most 20
    out = orthogonalise((10.0**scale * u * values @ v.T)[None], dtype=torch.float64, eps=1e-30)[0]
    inner = u.T @ out @ v
    assert float((inner - inner.diagonal().diag()).abs().max()) < 1e-8
    assert 0.6 < float(inner.diagonal().min()) <= float(inner.diagonal().max()) < 1.25
    torch.testing.assert_close(u @ inner @ v.T, out)


def test_a_stack_is_orthogonalised_matrix_by_matrix_and_zeros_stay_zero() -> None:
    stack = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    stack[2] = 0
    together = orthogonalise(stack)
    for one, alone in zip(together, stack, strict=True):
        torch.testing.assert_close(one, orthogonalise(alone[None])[0])
    assert not together[2].any()


@pytest.mark.parametrize("scale", ["match_adamw", "spectral"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_single_matrix_follows_torch_s_muon(scale: str, nesterov: bool) -> None:
    names = {"match_adamw": "match_rms_adamw", "spectral": "original"}
    ours, theirs = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)
    theirs.load_state_dict(ours.state_dict())
    mine = Muon(
        lr=0.02, weight_decay=0.1, nesterov=nesterov, scale=scale, newton_schulz_dtype="bfloat16", schedule=FLAT
    ).build(ours, 5)
    reference = torch.optim.Muon(
        theirs.parameters(), lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=names[scale]
    )
    for step in range(5):
        set_grads(ours, step)
        set_grads(theirs, step)
        mine.step(step)
        reference.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=2e-3)  # bfloat16 products, other order


def test_matrices_go_to_muon_and_embedding_head_norms_and_biases_to_adamw() -> None:
    assert Muon().takes(Net()) == {"up.weight", "same.weight", "experts"}
    assert Muon(adamw=("experts",)).takes(Net()) == {"up.weight", "same.weight"}
    with pytest.raises(ValueError, match="'router' matches no parameter"):
        Muon(adamw=("router",)).takes(Net())
    optimizer = Muon().build(Net(), 1)
    everyone = [m.name for part in optimizer.parts for m in part.members()]
    assert sorted(everyone) == sorted(name for name, _ in Net().named_parameters())


@given(rows=st.integers(1, 4096), columns=st.integers(1, 4096))
def test_the_scale_that_matches_adamw_gives_an_orthogonal_update_a_root_mean_square_of_one_fifth(
    rows: int, columns: int
) -> None:
    rms_of_orthogonal = math.sqrt(min(rows, columns) / (rows * columns))
    assert update_scale("match_adamw", rows, columns) * rms_of_orthogonal == pytest.approx(0.2)
    assert update_scale("spectral", rows, columns) == math.sqrt(max(1, rows / columns))


def test_recorded_updates_have_about_adamw_s_size() -> None:
    model = Net()
    optimizer = Muon(record=("update_rms",), schedule=FLAT).build(model, 1)
    set_grads(model, 0)
    logs = optimizer.step(0)
    assert 0.12 < logs["update_rms/up.weight"] < 0.26
    assert logs["update_rms/head.weight"] == pytest.approx(1.0, abs=1e-3)  # AdamW's first step


def test_batches_of_matrices_are_bounded_without_changing_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    together = trained(Muon())
    monkeypatch.setattr(muon_module, "_BATCH_ELEMENTS", 1)
    alone = trained(Muon())
    for name, value in together.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)


def test_each_expert_of_a_stack_moves_as_it_would_alone() -> None:
    model = Net()
    set_grads(model, 0)
    before, grad = model.experts.detach().clone(), model.experts.grad
    assert grad is not None
    Muon(lr=0.1, weight_decay=0.0, schedule=FLAT, momentum=0.0).build(model, 1).step(0)
    for expert in range(3):
        direction = orthogonalise(grad[expert][None])[0] * update_scale("match_adamw", 8, 16)
        torch.testing.assert_close(model.experts.detach()[expert], before[expert] - 0.1 * direction)


@pytest.mark.parametrize(("decay", "shrink"), [("coupled", 1 - 0.1 * 0.3), ("independent", 0.7)])
def test_decay_is_that_of_the_settings_for_both_parts(decay: str, shrink: float) -> None:
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    Muon(lr=0.1, weight_decay=0.3, decay=decay, schedule=FLAT).build(model, 1).step(0)
    for name in ("up.weight", "experts", "embed.weight", "head.weight"):
        torch.testing.assert_close(model.get_parameter(name).detach(), before[name] * shrink)
    for name in ("up.bias", "norm.weight"):
        torch.testing.assert_close(model.get_parameter(name).detach(), before[name])


def test_adamw_s_part_can_have_its_own_learning_rate() -> None:
    start = {name: p.detach() for name, p in Net().named_parameters()}
    after = trained(Muon(lr=0.01, adamw_lr=0.5, weight_decay=0.0, schedule=FLAT), 1)
    assert float((after["embed.weight"] - start["embed.weight"]).abs().mean()) == pytest.approx(0.5, rel=1e-3)
    assert float((after["up.weight"] - start["up.weight"]).abs().max()) < 0.02
