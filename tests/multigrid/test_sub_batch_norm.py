"""Sub-batch norm: splits are separate batch norms, one split is torch's, statistics merge to those of the union."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resilin.multigrid.norms import plain_norms, replace_norms
from resilin.multigrid.sub_batch_norm import SubBatchNorm


def random_norm(features: int, splits: int, dtype: torch.dtype = torch.float64) -> SubBatchNorm:
    norm = SubBatchNorm(features).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.set_splits(splits)
    return norm


@pytest.mark.parametrize("shape", [(12, 3), (12, 3, 5), (12, 3, 4, 5), (12, 3, 2, 4, 5)])
@pytest.mark.parametrize("splits", [1, 2, 3, 6])
def test_splits_are_separate_batch_norms(shape: tuple[int, ...], splits: int) -> None:
    torch.manual_seed(0)
    norm = random_norm(3, splits)
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    ours = x.clone().requires_grad_()
    (norm(ours) * weight).sum().backward()
    theirs = x.clone().requires_grad_()
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    parts = [kind(3).double() for _ in range(splits)]
    out, gain, shift = torch.zeros_like(x), 0.0, 0.0
    for i, part in enumerate(parts):
        part.load_state_dict({**part.state_dict(), "weight": norm.weight.data, "bias": norm.bias.data})
        out[i::splits] = part(theirs[i::splits])
    (out * weight).sum().backward()
    gain, shift = sum(p.weight.grad for p in parts), sum(p.bias.grad for p in parts)  # type: ignore[misc]
    assert torch.allclose(norm(x), out, atol=1e-9)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-9)  # type: ignore[arg-type]
    assert torch.allclose(norm.weight.grad, gain, atol=1e-9)  # type: ignore[arg-type]
    assert torch.allclose(norm.bias.grad, shift, atol=1e-9)  # type: ignore[arg-type]


def test_split_averages_are_those_of_separate_norms() -> None:
    norm, parts = random_norm(3, 2), [nn.BatchNorm1d(3).double() for _ in range(2)]
    for _ in range(4):
        x = torch.randn(8, 3, dtype=torch.float64)
        norm(x)
        for i, part in enumerate(parts):
            part(x[i::2])
    assert torch.allclose(norm.running_mean, torch.stack([p.running_mean for p in parts]))
    assert torch.allclose(norm.running_var, torch.stack([p.running_var for p in parts]))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_split_is_ordinary_batch_norm_to_the_bit(momentum: float | None) -> None:
    ordinary, ours = nn.BatchNorm2d(4, momentum=momentum), SubBatchNorm(4, momentum=momentum)
    ours.load_state_dict(ordinary.state_dict())
    for _ in range(3):
        x = torch.randn(6, 4, 5, 5)
        assert torch.equal(ordinary(x), ours(x))
    assert ordinary.state_dict().keys() == ours.state_dict().keys()
    for name, value in ordinary.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    ordinary.eval()
    ours.eval()
    assert torch.equal(ordinary(x), ours(x))


def test_merged_statistics_are_those_of_the_union() -> None:
    x = torch.randn(24, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 5.0]) + torch.arange(24)[:, None]
    norm = random_norm(3, 4)
    norm.running_mean = torch.stack([x[i::4].mean(0) for i in range(4)])
    norm.running_var = torch.stack([x[i::4].var(0, correction=0) for i in range(4)])
    mean, variance = norm.merged()
    assert torch.allclose(mean, x.mean(0))
    assert torch.allclose(variance, x.var(0, correction=0))


def test_changing_k_keeps_what_evaluation_sees_and_replaces_no_parameter() -> None:
    norm = random_norm(3, 4)
    weight, x = norm.weight, torch.randn(8, 3, dtype=torch.float64)
    norm(x)
    norm.eval()
    before = norm(x)
    for splits in (2, 8, 1, 3):
        norm.set_splits(splits)
        assert torch.allclose(norm(x), before)
        assert norm.running_mean.shape == ((3,) if splits == 1 else (splits, 3))
    assert norm.weight is weight
    with pytest.raises(ValueError, match="at least 1 split"):
        norm.set_splits(0)


def test_a_batch_that_does_not_divide_falls_back_to_the_greatest_common_divisor() -> None:
    norm, reference = random_norm(3, 4), random_norm(3, 2)
    reference.load_state_dict({**reference.state_dict(), "weight": norm.weight.data, "bias": norm.bias.data})
    x = torch.randn(6, 3, dtype=torch.float64)
    assert norm.splits_of(6) == 2
    assert torch.allclose(norm(x), reference(x))
    for i in range(4):
        assert torch.allclose(norm.running_mean[i], reference.running_mean[i % 2])
        assert torch.allclose(norm.running_var[i], reference.running_var[i % 2])
    assert norm(torch.randn(3, 3, dtype=torch.float64)).isfinite().all()
    assert norm.splits_of(1) == 1


def test_part_of_a_batch_has_as_many_splits_as_fit() -> None:
    norm = random_norm(3, 8)
    norm.group = 8
    assert [norm.splits_of(n) for n in (64, 32, 16, 8, 4, 1)] == [8, 4, 2, 1, 1, 1]


def test_channels_last_batches_give_the_same() -> None:
    norm = random_norm(4, 2, torch.float32)
    x = torch.randn(4, 4, 6, 6)
    assert torch.allclose(norm(x), norm(x.to(memory_format=torch.channels_last)), atol=1e-6)


def test_a_checkpoint_of_any_k_is_taken_back() -> None:
    norm, fresh = random_norm(3, 4), SubBatchNorm(3).double()
    norm(torch.randn(8, 3, dtype=torch.float64))
    fresh.load_state_dict(norm.state_dict())
    assert fresh.splits == 4
    assert torch.equal(fresh.running_var, norm.running_var)
    fresh.load_state_dict(SubBatchNorm(3).double().state_dict())
    assert fresh.splits == 1


def test_models_are_converted_and_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))
    x = torch.randn(4, 3, 6, 6)
    names, wanted = list(model.state_dict()), model.eval()(x)
    assert replace_norms(model, 8) == 2
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), wanted)
    for module in model.modules():
        if isinstance(module, SubBatchNorm):
            module.set_splits(2)
    model.train()(x)
    trained = model.eval()(x)
    plain_norms(model, 2)
    assert not any(isinstance(m, SubBatchNorm) for m in model.modules())
    assert torch.allclose(model(x), trained, atol=1e-6)
    assert replace_norms(nn.Sequential(nn.Linear(2, 2)), 8) == 0
