"""Attaching: what is matched, what is trained, what is refused, and what stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resilin.adapt.attach import adapted_maps, attach, detach_all, trainable_count
from resilin.adapt.settings import AdapterSettings
from resilin.adapt.targets import AdapterError
from resilin.inference.generate import StopRule, generate
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.optim.adamw import AdamW

TOKENS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(2))


def logits(model: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS).hidden_BTD)


@pytest.mark.parametrize("method", ["miss", "mini", "bat_col", "bat_row", "bat_ab", "lora", "rslora", "dora"])
def test_a_decoder_stays_a_decoder_with_the_same_bits_and_names(decoder, settings, method) -> None:
    plain, model = decoder(), decoder({"a": settings(method)})
    assert type(model) is Decoder
    assert torch.equal(logits(model), logits(plain))
    names = {name for name, _ in model.named_parameters() if ".adapters." not in name}
    assert names == {name for name, _ in plain.named_parameters()}
    stop = StopRule(6)
    assert generate(model, [[1, 2, 3]], stop)[0].tokens == generate(plain, [[1, 2, 3]], stop)[0].tokens


@pytest.mark.parametrize("method", ["miss", "bat_col", "bat_row", "dora"])
def test_generation_with_a_cache_agrees_with_the_whole_text_at_once(decoder, settings, move, method) -> None:
    model = decoder({"a": settings(method)})
    move(model, 0.1)
    answer = generate(model, [[1, 2, 3]], StopRule(6))[0].tokens
    text = [1, 2, 3]
    for token in answer:
        with torch.no_grad():
            assert int(model.logits(model(torch.tensor([text])).hidden_BTD)[0, -1].argmax()) == token
        text.append(token)


def test_only_the_adapter_is_trained_and_the_optimizer_sees_only_that(decoder) -> None:
    model = decoder({"a": AdapterSettings(method="lora", rank=2)})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".adapters.a." in name for name in trained)
    optimizer = AdamW().build(model, 10)
    assert {m.name for part in optimizer.parts for m in part.members()} == trained


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q", "down"), {"attention.q", "mlp.down"}),
        (("q_proj", "v_proj"), {"attention.q", "attention.v"}),
        (("self_attn.o_proj",), {"attention.o"}),
        (r".*mlp\..*", {"mlp.gate", "mlp.up", "mlp.down"}),
        (r"model\.layers\.\d+\.self_attn\.[qk]_proj", {"attention.q", "attention.k"}),
        ("all-linear", {f"attention.{m}" for m in "qkvo"} | {f"mlp.{m}" for m in ("gate", "up", "down")}),
    ],
)
def test_targets_by_name_by_hugging_face_name_and_by_pattern(decoder, targets, expected) -> None:
    model = decoder({"a": AdapterSettings(rank=4, targets=targets)})
    assert set(adapted_maps(model)) == {f"blocks.{layer}.{name}" for layer in (0, 1) for name in expected}


def test_layers_and_exclusions(decoder) -> None:
    model = decoder({"a": AdapterSettings(rank=4, layers=(1,), exclude=("up", "gate_proj"))})
    assert set(adapted_maps(model)) == {f"blocks.1.attention.{m}" for m in "qkvo"} | {"blocks.1.mlp.down"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targets": ("q_prj",)}, r"matches no linear map; did you mean q_proj"),
        ({"targets": r"nothing.*"}, r"matches no linear map; .*linear maps here end with: .*down_proj"),
        ({"targets": "["}, r"not a regular expression"),
        ({"targets": ("q",), "layers": (7,)}, r"in layers \(7,\) matches no linear map"),
        ({"targets": ("attention",)}, r"blocks\.0\.attention is a Attention; adapters go on linear maps only"),
        ({"targets": ("lm_head",)}, r"head is the output head.*modules_to_save"),
        ({"method": "bat", "rank": 5}, r"blocks\.0\.attention\.q is 16 x 16.*rank 5 .*nearest.* 14 maps: 4 and 8"),
        ({"method": "mini", "mini_rank": 16}, r"k is 8 x 16.*mini_rank 16 should divide the outputs: .*: 8"),
        ({"modules_to_save": ("heed",)}, r"modules_to_save names 'heed'.*did you mean head"),
        ({"modules_to_save": ("q",), "targets": ("q",)}, r"both adapted and trained in full"),
    ],
)
def test_what_cannot_be_attached_is_said_and_nothing_is_changed(decoder, wrong, message) -> None:
    model = decoder()
    before = logits(model)
    with pytest.raises(AdapterError, match=message):
        attach(model, {"ok": AdapterSettings(rank=4, targets=("v",)), "a": AdapterSettings(**{"rank": 4, **wrong})})
    assert not adapted_maps(model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "mis"}, "Input should be"),
        ({"method": "miss", "alpha": 4}, "miss has no alpha"),
        ({"method": "bat", "dropout": 0.1}, "dropout = 0"),
        ({"method": "mini"}, "needs mini_rank"),
        ({"method": "lora", "mini_rank": 2}, "belongs to method mini"),
        ({"targets": ()}, "names no module"),
        ({"rank": 0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_adapter(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterSettings(**wrong)


def test_names_of_the_paper_and_of_peft() -> None:
    names = {"bone": "miss", "bat": "bat_col", "Bone-col": "bat_col", "bone_row": "bat_row", "bone-ab": "bat_ab"}
    assert {alias: AdapterSettings(method=alias).method for alias in names} == names


class Packed(nn.Linear):
    """A quantised map: int8 numbers and a scale."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        scale = self.weight.abs().max() / 127
        self.register_buffer("scale", scale.detach())
        self.weight = nn.Parameter((self.weight / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


@pytest.mark.parametrize("method", ["bat_col", "dora"])
def test_a_quantised_weight_is_refused_where_the_weight_itself_is_needed(settings, method) -> None:
    with pytest.raises(AdapterError, match=rf"0 has a quantised weight \(torch.int8\), and {method} computes with"):
        attach(nn.Sequential(Packed(8, 8)), {"a": settings(method)})


@pytest.mark.parametrize("method", ["miss", "lora", "bat_row"])
def test_a_quantised_weight_is_adapted_where_its_products_suffice(settings, move, method) -> None:
    from resilin.adapt.merge import merge

    model = nn.Sequential(Packed(8, 8))
    x = torch.randn(3, 8)
    before = model(x)
    attach(model, {"a": settings(method)})
    assert torch.equal(model(x), before)
    move(model, 0.1)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model[0].adapters.parameters())
    with pytest.raises(AdapterError, match="quantised"):
        merge(model)


def test_biases_and_whole_modules_are_trained_beside_the_adapter(decoder) -> None:
    def trained(**more) -> set[str]:
        model = decoder({"a": AdapterSettings(rank=4, targets=("q",), **more)}, qkv_bias=True)
        return {n for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in n}

    assert trained(bias="only") == {f"blocks.{i}.attention.q.bias" for i in (0, 1)}
    assert trained(bias="all") == {f"blocks.{i}.attention.{m}.bias" for i in (0, 1) for m in "qkv"}
    assert trained(modules_to_save=("lm_head", "norm")) == {"head.weight", "norm.weight"}


def test_two_adapters_cannot_both_train_the_models_own_parameters(decoder) -> None:
    both = {name: AdapterSettings(rank=4, modules_to_save=("head",)) for name in "ab"}
    with pytest.raises(AdapterError, match="only one adapter may train parameters of the model itself, and a, b would"):
        decoder(both)


@pytest.mark.parametrize("name", ["a.b", "", "a b"])
def test_names_that_would_break_a_parameters_name(decoder, name) -> None:
    with pytest.raises(AdapterError, match="letters, digits"):
        decoder({name: AdapterSettings(rank=4)})


def test_a_name_is_given_once(decoder) -> None:
    model = decoder({"a": AdapterSettings(rank=4)})
    with pytest.raises(AdapterError, match="'a' is attached already"):
        attach(model, {"a": AdapterSettings(rank=4)})


def test_dropout_needs_a_module_that_takes_keys(settings) -> None:
    with pytest.raises(AdapterError, match="no module of this Sequential takes any"):
        attach(nn.Sequential(nn.Linear(8, 8)), {"a": settings("miss", dropout=0.1)})


def test_initial_values_belong_to_seed_and_name_not_to_order(decoder) -> None:
    one = decoder({"a": AdapterSettings(method="lora", rank=2), "b": AdapterSettings(method="lora", rank=2)})
    other = decoder({"b": AdapterSettings(method="lora", rank=2), "a": AdapterSettings(method="lora", rank=2)})
    of_one, of_other = dict(one.named_parameters()), dict(other.named_parameters())
    assert all(torch.equal(of_one[name], of_other[name]) for name in of_one)
    down = one.blocks[0].attention.q.adapters
    assert not torch.equal(down["a"].down, down["b"].down)


def test_copies_are_independent_and_detaching_gives_the_old_model_back(decoder, move) -> None:
    model = decoder({"a": AdapterSettings(rank=4)})
    twin = copy.deepcopy(model)
    move(twin, 0.1)
    plain = decoder()
    assert torch.equal(logits(model), logits(plain))
    assert not torch.equal(logits(twin), logits(plain))
    detach_all(twin)
    assert torch.equal(logits(twin), logits(plain))
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    assert trainable_count(model) > 0


class Doubling(nn.Linear):
    """A linear map with something of its own, like a mask."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * x)


@pytest.mark.parametrize("method", ["miss", "lora", "bat_row"])
def test_what_a_map_does_itself_goes_on_below_its_adapters(settings, move, method) -> None:
    model = nn.Sequential(Doubling(8, 8))
    x = torch.randn(3, 8)
    before = model(x)
    attach(model, {"a": settings(method)})
    assert torch.equal(model(x), before)
    move(model, 0.1)
    assert not torch.allclose(model(x), before)
    model(x).sum().backward()


@pytest.mark.parametrize("method", ["bat_col", "dora"])
def test_a_map_that_does_more_is_refused_where_the_weight_itself_is_needed(settings, method) -> None:
    with pytest.raises(AdapterError, match=rf"0 is a Doubling, which does more .*, and {method} computes with"):
        attach(nn.Sequential(Doubling(8, 8)), {"a": settings(method)})


@pytest.mark.parametrize("method", ["miss", "lora", "bat_row", "bat_ab", "bat_col", "dora"])
def test_the_plain_form_of_adapters_on_a_sparse_map_is_one_dense_map(settings, move, method) -> None:
    from resilin.models.linear import Linear
    from resilin.models.plain import make_plain
    from resilin.sparsity.linear import SparseLinear

    torch.manual_seed(4)
    model = nn.Sequential(SparseLinear(nn.Linear(8, 8), n=2, m=4))
    attach(model, {"a": settings(method)})
    move(model, 0.1)
    x = torch.randn(3, 8)
    before = model(x)
    plain = make_plain(model)
    assert type(plain[0]) is Linear
    torch.testing.assert_close(plain(x), before, atol=1e-5, rtol=1e-5)


def test_a_decoder_with_adapters_draws_random_numbers_only_with_dropout() -> None:
    for rate in (0.0, 0.1):
        model = Decoder(DecoderSettings(vocab_size=11, hidden_size=16, layers=1, heads=2, mlp_size=24))
        attach(model, {"default": AdapterSettings(method="lora", rank=2, dropout=rate)})
        assert model.draws == (rate > 0)
