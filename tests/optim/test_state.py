from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from resilin.optim.adamw import AdamW
from resilin.optim.muon import Muon
from resilin.optim.scheduled import ScheduledSettings
from resilin.optim.sgd import SGD

KINDS: list[ScheduledSettings] = [AdamW(lr=0.01), Muon(lr=0.01), SGD(lr=0.01)]


def net(reverse: bool = False, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layers = [("up", nn.Linear(6, width)), ("norm", nn.LayerNorm(width)), ("down", nn.Linear(width, 3))]
    return nn.Sequential(OrderedDict(reversed(layers) if reverse else layers))


def steps(model: nn.Module, optimizer: object, first: int, last: int) -> None:
    for step in range(first, last):
        for name, p in model.named_parameters():
            g = torch.Generator().manual_seed(step * 1000 + len(name) * 10 + p.numel())
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step(step)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_resumed_optimizer_continues_to_the_bit_whatever_the_order_of_parameters(
    kind: ScheduledSettings, reverse: bool
) -> None:
    model = net()
    optimizer = kind.build(model, 10)
    steps(model, optimizer, 0, 4)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    saved = {
        name: {key: tensor.clone() for key, tensor in moments.items()}
        for name, moments in optimizer.state_dict()["parameters"].items()
    }
    steps(model, optimizer, 4, 10)

    other = net(reverse)
    other.load_state_dict(weights)
    resumed = kind.build(other, 10)
    resumed.load_state_dict({"parameters": saved})
    steps(other, resumed, 4, 10)
    found = dict(other.named_parameters())
    assert all(torch.equal(p, found[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: type(k).__name__)
def test_the_state_is_complete_before_the_first_step(kind: ScheduledSettings) -> None:
    model = net()
    optimizer = kind.build(model, 10)
    before = optimizer.state_dict()["parameters"]
    steps(model, optimizer, 0, 1)
    after = optimizer.state_dict()["parameters"]
    assert {n: sorted(m) for n, m in before.items()} == {n: sorted(m) for n, m in after.items()}
    assert set(before) == {name for name, _ in model.named_parameters()}


def test_a_state_that_does_not_fit_is_refused_by_name_and_nothing_changes() -> None:
    model = net()
    optimizer = AdamW().build(model, 10)
    steps(model, optimizer, 0, 2)
    state = optimizer.state_dict()["parameters"]
    kept = optimizer.state_dict()["parameters"]["up.weight"]["exp_avg"].clone()

    def refused(tree: dict[str, object], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict({"parameters": tree})
        assert torch.equal(kept, optimizer.state_dict()["parameters"]["up.weight"]["exp_avg"])

    zeros = {name: {key: torch.zeros_like(t) for key, t in m.items()} for name, m in state.items()}
    refused({n: m for n, m in zeros.items() if n != "norm.bias"}, "lacks parameter 'norm.bias'")
    refused({**zeros, "head.weight": {}}, "'head.weight', which this model does not train")
    refused({**zeros, "down.bias": {"momentum": torch.zeros(3)}}, "'down.bias' holds momentum.*saved by another one")
    wide = AdamW().build(net(width=9), 10).state_dict()["parameters"]
    refused(wide, r"'exp_avg' of parameter 'up.weight' has shape \(9, 6\); this model's is \(8, 6\)")


def test_frozen_parameters_have_no_state_and_do_not_move() -> None:
    model = net()
    model.up.weight.requires_grad_(False)
    before = model.up.weight.detach().clone()
    optimizer = AdamW(decay="independent", weight_decay=0.5).build(model, 10)
    steps(model, optimizer, 0, 2)
    assert "up.weight" not in optimizer.state_dict()["parameters"]
    assert torch.equal(before, model.up.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: type(k).__name__)
def test_on_a_gpu_moments_live_there_and_a_state_from_the_cpu_loads(kind: ScheduledSettings) -> None:
    saved = kind.build(net(), 10).state_dict()
    model = net().cuda()
    optimizer = kind.build(model, 10)
    optimizer.load_state_dict(saved)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(0)
    assert all(t.is_cuda for m in optimizer.state_dict()["parameters"].values() for t in m.values())


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: type(k).__name__)
def test_workers_that_own_parts_of_a_model_say_the_same_groups_as_one_that_has_it(kind: ScheduledSettings) -> None:
    model = net()
    whole = kind.build(model, 10).state_dict()["groups"]
    assert sorted(name for group in whole for name in group["parameters"]) == sorted(dict(model.named_parameters()))
    named = dict(model.named_parameters())
    for names in (["up.weight", "up.bias"], ["down.weight"], []):
        owned = {name: named[name] for name in names}
        state = kind.build_owned(model, 10, owned).state_dict()
        assert set(state["parameters"]) == set(names)
        assert state["groups"] == whole
