"""Several adapters on one model: chosen, combined, switched off, merged and taken out again."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from resilin.adapt.attach import attach
from resilin.adapt.merge import merge, unmerge
from resilin.adapt.settings import AdapterSettings
from resilin.adapt.switch import before_training, use_adapters, with_adapters, without_adapters
from resilin.adapt.targets import AdapterError
from resilin.models.decoder import Decoder
from resilin.models.plain import make_plain

TOKENS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(2))


def logits(model: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS).hidden_BTD)


@pytest.fixture
def three(one, settings, move):
    """A map with `a` (miss), `b` (lora) and `c` (bat_col), none of them the identity."""
    model = one("miss")
    attach(model, {"b": settings("lora"), "c": settings("bat_col")}, seed=2)
    move(model, 0.2)
    return model


def by_weight(model, *chain: tuple[str, float]) -> torch.Tensor:
    weight = model.map.weight.detach()
    for name, strength in chain:
        weight = model.map.adapters[name].changed(weight, strength).detach()
    return weight


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "a", "b"), ("b", "c", "a"), ("c",), ("b", "a")])
def test_adapters_are_applied_in_order_each_to_the_weight_of_those_before(three, order) -> None:
    x = torch.randn(5, 12, dtype=torch.float64)
    use_adapters(three, order)
    expected = linear(x, by_weight(three, *((name, 1.0) for name in order)), three.map.bias)
    torch.testing.assert_close(three(x), expected, atol=1e-12, rtol=1e-12)
    three(x).sum().backward()


def test_adding_commutes_and_multiplying_does_not(three) -> None:
    x = torch.randn(5, 12, dtype=torch.float64)
    outputs = {}
    for order in (("a", "b"), ("b", "a"), ("a", "c"), ("c", "a")):
        with with_adapters(three, order):
            outputs[order] = three(x)
    torch.testing.assert_close(outputs["a", "b"], outputs["b", "a"], atol=1e-12, rtol=1e-12)
    assert not torch.allclose(outputs["a", "c"], outputs["c", "a"])


def test_strengths_multiply_what_is_added(three) -> None:
    x = torch.randn(5, 12, dtype=torch.float64)
    base = linear(x, three.map.weight, three.map.bias)
    with with_adapters(three, "a"):
        whole = three(x)
    with with_adapters(three, {"a": 0.25}):
        torch.testing.assert_close(three(x) - base, 0.25 * (whole - base), atol=1e-12, rtol=1e-12)
    chain = (("c", 0.5), ("b", -1.0))
    with with_adapters(three, dict(chain)):
        expected = linear(x, by_weight(three, *chain), three.map.bias)
        torch.testing.assert_close(three(x), expected, atol=1e-12, rtol=1e-12)


def test_without_adapters_the_model_is_its_base_to_the_bit_and_then_again_itself(decoder, settings, move) -> None:
    plain, model = decoder(), decoder({"a": settings("bat_col"), "b": settings("dora")})
    move(model, 0.1)
    adapted = logits(model)
    with without_adapters(model):
        assert torch.equal(logits(model), logits(plain))
        with with_adapters(model, "b"):
            assert not torch.equal(logits(model), logits(plain))
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), adapted)
    with pytest.raises(RuntimeError, match="inside"), without_adapters(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), adapted)


def test_without_adapters_trained_biases_and_modules_are_the_old_ones_too(decoder) -> None:
    adapter = AdapterSettings(rank=4, bias="all", modules_to_save=("head", "norm"))
    plain, model = decoder(qkv_bias=True), decoder({"a": adapter}, qkv_bias=True)
    hidden = model(TOKENS).hidden_BTD
    loss = model.logits(hidden).square().sum()
    with torch.no_grad(), without_adapters(model):  # in the middle of a graph that is still to be walked back
        assert torch.equal(model.logits(model(TOKENS).hidden_BTD), logits(plain))
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad.sign())
    adapted = logits(model)
    with without_adapters(model):
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), adapted)
    assert not torch.allclose(adapted, logits(plain))


def test_before_training_frozen_adapters_stay_on(decoder, settings, move) -> None:
    start = decoder({"old": settings("bat_col")})
    move(start, 0.1)
    model = decoder({"old": settings("bat_col")})
    move(model, 0.1)
    model.requires_grad_(False)
    attach(model, {"new": settings("lora")})
    assert torch.equal(logits(model), logits(start))
    move(model, 0.2, "new")
    moved = logits(model)
    with before_training(model):
        assert torch.equal(logits(model), logits(start))
    assert torch.equal(logits(model), moved)
    assert not torch.allclose(moved, logits(start), atol=1e-2)


def test_an_adapter_that_came_with_values_and_is_trained_further_has_no_before(decoder, settings, tmp_path) -> None:
    from resilin.adapt.peft_folder import load_adapter, save_adapter

    save_adapter(decoder({"x": settings("miss")}), tmp_path, "x")
    model = decoder()
    load_adapter(model, tmp_path, "sft")
    before = logits(model)
    with (
        pytest.raises(AdapterError, match=r"'sft' was loaded with values and is trained further.*frozen = \['sft'\]"),
        before_training(model),
    ):
        pass
    assert torch.equal(logits(model), before)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with before_training(model):  # nothing is trained: nothing is switched off
        assert torch.equal(logits(model), before)


def test_wrong_names_strengths_and_moments(three, one) -> None:
    with pytest.raises(AdapterError, match="no adapter 'd'; attached are: a, b, c"):
        use_adapters(three, "d")
    with pytest.raises(AdapterError, match="dora, which rescales"):
        use_adapters(one("dora"), {"a": 0.5})
    with pytest.raises(AdapterError, match="has no adapters"):
        use_adapters(torch.nn.Linear(2, 2), "a")
    with pytest.raises(AdapterError, match="b, c cannot be merged alone: in use are a, b, c"):
        merge(three, ["b", "c"])
    with pytest.raises(AdapterError, match="nothing to take out"):
        unmerge(three)
    merge(three, ["a"])
    for moment in (lambda: use_adapters(three, "a"), lambda: merge(three)):
        with pytest.raises(AdapterError, match="a are merged"):
            moment()
    with pytest.raises(ValueError, match="would apply them twice"):
        three.state_dict()


def test_the_first_adapters_can_be_merged_below_the_others(three) -> None:
    x = torch.randn(5, 12, dtype=torch.float64)
    weight, before = three.map.weight.detach().clone(), three(x)
    for count in (1, 2, 3):
        merge(three, ["a", "b", "c"][:count], keep=False)
        torch.testing.assert_close(three(x), before, atol=1e-12, rtol=1e-12)
        unmerge(three)
        torch.testing.assert_close(three.map.weight.detach(), weight, atol=1e-10, rtol=0)


def test_dora_cannot_be_merged_without_a_copy(one) -> None:
    model = one("dora", moved=0.1)
    weight = model.map.weight.detach().clone()
    with pytest.raises(AdapterError, match="keep=True"):
        merge(model, keep=False)
    assert torch.equal(model.map.weight, weight)


def test_a_merge_that_is_not_finite_changes_nothing(decoder) -> None:
    model = decoder({"a": AdapterSettings(rank=4)})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.blocks[1].mlp.down.adapters["a"].block[0, 0] = torch.inf
    with pytest.raises(AdapterError, match=r"blocks\.1\.mlp\.down: the merged weight is not finite"):
        merge(model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items() if ".adapters." not in n)


@pytest.mark.parametrize("method", ["miss", "mini", "bat_col", "bat_row", "bat_ab", "lora", "rslora", "dora"])
def test_the_plain_form_is_a_decoder_without_adapters_that_computes_the_same(decoder, settings, move, method) -> None:
    model = decoder({"a": settings(method)})
    move(model, 0.1)
    before = logits(model)
    plain = make_plain(model)
    assert [type(m) for m in plain.modules()] == [type(m) for m in decoder().modules()]
    assert set(plain.state_dict()) == set(decoder().state_dict())
    torch.testing.assert_close(logits(plain), before, atol=2e-5, rtol=2e-5)
