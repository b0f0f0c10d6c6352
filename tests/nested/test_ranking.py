"""What matters is put first, and the whole model computes the same."""

from __future__ import annotations

import pytest
import torch
from elastic_cases import KINDS, batch, whole

from resilin.models.mamba import Mamba2
from resilin.nested.importance import ImportanceError, put_in_order
from resilin.nested.ranking import (
    ablation_errors,
    activation_scores,
    depth_order,
    order_stream,
    random_scores,
    weight_scores,
)


def logits(model):
    return model.logits(model(batch()["tokens"]).hidden_BTD)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["activation", "weight", "random"])
def test_any_order_leaves_the_whole_model_as_it_was(kind, by):
    model = whole(kind)
    before = logits(model)
    scores = {
        "activation": lambda: activation_scores(model, [batch()]),
        "weight": lambda: weight_scores(model),
        "random": lambda: random_scores(model, 3),
    }[by]()
    put_in_order(model, scores)
    order_stream(model, scores["hidden"])
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_in_order_the_scores_fall(kind):
    model = whole(kind)
    scores = activation_scores(model, [batch()])
    put_in_order(model, scores)
    order_stream(model, scores["hidden"])
    again = activation_scores(model, [batch()])
    for name, found in again.items():
        if name == "hidden" or name.endswith("mlp"):
            assert (found.diff() <= 1e-9).all(), name
            torch.testing.assert_close(found, scores[name].sort(descending=True).values, rtol=1e-9, atol=1e-9)
        elif name.endswith("mamba"):
            assert (found.view(4, -1).norm(dim=0).diff() <= 1e-9).all()
            best = found.view(4, -1)[:, :3].norm(dim=1).view(2, 2)
            assert (best.diff(dim=1) <= 1e-9).all()
        else:
            of_head = found.view(2, 2, -1).sum(-1)
            assert (of_head.diff(dim=1) <= 1e-9).all()
            assert (of_head.sum(1).diff() <= 1e-9).all()


def test_scores_are_sums_of_what_the_spec_names():
    model, seen = whole("hybrid"), {}
    mlp, mamba = model.blocks[1], model.blocks[0]
    mlp.mlp.up.register_forward_hook(lambda _, __, y: seen.update(up=y))
    mamba.mamba.x.register_forward_hook(lambda _, __, y: seen.update(x=y))
    scores = activation_scores(model, [batch()])
    torch.testing.assert_close(scores["blocks.1.mlp"], seen["up"].abs().sum((0, 1)))
    torch.testing.assert_close(scores["blocks.0.mamba"], seen["x"].square().sum((0, 1)).sqrt())
    assert isinstance(mamba.mamba, Mamba2)
    with pytest.raises(ImportanceError, match="no batch"):
        activation_scores(model, [])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("iterative", [True, False])
def test_a_layer_that_adds_nothing_is_least_important(kind, iterative):
    model = whole(kind)
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.2.") and name.endswith((".o.weight", ".down.weight", ".out.weight")):
            parameter.zero_()
    errors = ablation_errors(model, [batch()])
    assert errors[2] == 0
    assert all(error > 0 for layer, error in errors.items() if layer != 2)
    order = depth_order(model, [batch()], iterative=iterative)
    assert order[-1] == 2
    assert sorted(order) == list(range(model.settings.layers))


@torch.no_grad()
def test_ablation_does_not_see_the_scale_of_logits():
    model = whole("dense")
    before = ablation_errors(model, [batch()])
    model.head.weight *= 7
    after = ablation_errors(model, [batch()])
    assert after == pytest.approx(before, rel=1e-9)
