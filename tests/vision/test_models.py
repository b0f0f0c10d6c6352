"""Vision models: the published sizes, any input shape, weights by seed and name, errors that name the setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from resilin.config import SettingsError, parse_settings
from resilin.keys import Keys
from resilin.models.settings import ModelContext, ModelSettings
from resilin.vision.flops import forward_flops
from resilin.vision.resnet import ResNet
from resilin.vision.slowfast import SlowFast
from resilin.vision.vit import ViT

CONTEXT = ModelContext(0)
SMALL = {
    "series": (ResNet(classes=3, dims=1, channels=2, stages=(1, 1), width=4), (2, 40)),
    "image": (ResNet(classes=3, dims=2, stages=(1, 1), width=4, stem="small"), (3, 16, 20)),
    "bottleneck": (ResNet(classes=3, dims=2, block="bottleneck", stages=(1, 1), width=4), (3, 32, 32)),
    "video": (ResNet(classes=3, dims=3, stages=(1, 1), width=4), (3, 4, 16, 16)),
    "slowfast": (SlowFast(classes=3, stages=(1, 1), width=8, stem="small"), (3, 8, 16, 16)),
    "vit": (ViT(classes=3, size=16, patch=4, width=16, layers=2, heads=2), (3, 16, 16)),
    "vit mean": (ViT(classes=3, size=16, patch=4, width=16, layers=2, heads=2, pool="mean"), (3, 16, 16)),
}


def count(settings: ModelSettings) -> int:
    return sum(p.numel() for p in settings.build(CONTEXT).parameters())


def test_published_parameter_counts() -> None:
    assert count(ResNet(classes=1000)) == 11_689_512  # ResNet-18
    assert count(ResNet(classes=1000, block="bottleneck", stages=(3, 4, 6, 3))) == 25_557_032  # ResNet-50
    assert count(ViT(classes=1000, width=192, heads=3)) == 5_717_416  # ViT-Ti/16


def test_slowfast_r50_has_its_published_size() -> None:
    model = SlowFast(classes=400, alpha=4).build(CONTEXT)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(34.5, abs=0.2)


def test_published_operations() -> None:
    model = ResNet(classes=1000).build(CONTEXT)
    assert forward_flops(model, (3, 224, 224)) / 2e9 == pytest.approx(1.81, abs=0.02)
    assert next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("name", SMALL)
def test_every_model_learns_from_every_parameter(name: str) -> None:
    settings, shape = SMALL[name]
    model = settings.build(CONTEXT)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    logits = model(torch.randn(4, *shape))
    assert logits.shape == (4, 3)
    logits.square().sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert still == []


@pytest.mark.parametrize("name", ["series", "image", "video", "slowfast"])
def test_any_number_of_frames_and_any_size(name: str) -> None:
    settings, shape = SMALL[name]
    model = settings.build(CONTEXT).eval()
    for divisor in (2, 4):
        smaller = (shape[0], *(max(1, n // divisor) for n in shape[1:]))
        assert model(torch.randn(2, *smaller)).shape == (2, 3)


def test_vit_resamples_its_positions() -> None:
    model = SMALL["vit"][0].build(CONTEXT)
    assert model.positions_for(4, 4) is model.positions
    assert model.positions_for(2, 6).shape == (1, 13, 16)
    assert torch.equal(model.positions_for(2, 6)[:, 0], model.positions[:, 0])
    flat = model.positions.data.clone().normal_()
    flat[:, 1:] = flat[:, 1:2]
    model.positions.data.copy_(flat)
    assert torch.allclose(model.positions_for(7, 3)[:, 1:], flat[:, 1:2], atol=1e-5)
    assert model(torch.randn(2, 3, 24, 8)).shape == (2, 3)
    with pytest.raises(ValueError, match="patches of 4"):
        model(torch.randn(2, 3, 18, 16))


def test_pathways_see_the_same_moments() -> None:
    settings = SlowFast(classes=2, stages=(1,), width=8, stem="small", alpha=4, dropout=0.0)
    model = settings.build(CONTEXT).eval()
    for frames in (16, 13, 4, 2, 1):
        inputs = torch.randn(1, 3, frames, 8, 8)
        slow = model.slow_stem(inputs[:, :, ::4])
        assert model.laterals[0](model.fast_stem(inputs)).shape[2] == slow.shape[2]


@pytest.mark.parametrize("name", SMALL)
def test_weights_are_a_function_of_seed_and_name(name: str) -> None:
    settings = SMALL[name][0]
    first, again, other = (settings.build(ModelContext(seed)) for seed in (5, 5, 6))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_dropout_is_keyed_by_slot() -> None:
    model = ViT(classes=3, size=8, patch=4, width=16, layers=1, heads=2, dropout=0.5).build(CONTEXT)
    nn.init.normal_(model.head.weight)
    inputs = torch.randn(4, 3, 8, 8)
    keys = Keys(0, 3, torch.arange(4))
    whole = model(inputs, keys=keys)
    assert torch.allclose(model(inputs[2:], keys=keys.rows(2, 4)), whole[2:], atol=1e-6)
    assert not torch.allclose(model(inputs), whole)


@pytest.mark.parametrize(
    ("kind", "tree", "message"),
    [
        (ResNet, {"classes": 2, "stages": []}, "should be one or more numbers"),
        (ResNet, {"classes": 2, "dims": 3, "time_kernels": [1]}, "1 values for 4 stages"),
        (ResNet, {"classes": 2, "dims": 3, "stem_time_kernel": 2}, "should be odd"),
        (SlowFast, {"classes": 2, "width": 12}, "not divisible by beta_inverse"),
        (SlowFast, {"classes": 2, "fusion_kernel": 4}, "should be odd"),
        (ViT, {"classes": 2, "size": 30}, "use 16 or 32"),
        (ViT, {"classes": 2, "heads": 5}, "not divisible by heads"),
    ],
)
def test_impossible_sizes_are_refused(kind: type, tree: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_settings(kind, tree, "test")


def test_inputs_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes inputs \(B, 3, T, H, W\).*set model.dims"):
        SMALL["video"][0].build(CONTEXT)(torch.randn(2, 3, 16, 16))
