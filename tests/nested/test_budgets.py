from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given, settings
from nested_cases import DECODERS, cases

from resilin.adapt import AdapterSettings, attach
from resilin.models.cut import CutError
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, LayerSizes, MoESettings
from resilin.models.memory import activation_bytes
from resilin.models.step_flops import step_flops_per_token
from resilin.nested import Budget, BudgetError, budget, latency, sub_model, sub_settings

PLAIN = DecoderSettings(vocab_size=37, hidden_size=16, layers=3, heads=8, kv_heads=2, mlp_size=24, init_std=0.4)
MIXED = PLAIN.model_copy(update={"moe": MoESettings(experts=4, experts_per_token=2, expert_size=24, dense_layers=(0,))})


@settings(max_examples=60)
@given(cases())
def test_a_budget_comes_back_from_json_and_pickle(case):
    _, wanted = case
    again = Budget.from_dict(json.loads(json.dumps(wanted.to_dict())))
    assert again == wanted
    assert hash(again) == hash(wanted)
    assert pickle.loads(pickle.dumps(wanted)) == wanted
    assert (str(wanted) == "full") == wanted.full


@settings(max_examples=30)
@given(cases())
def test_the_settings_of_a_sub_model_describe_exactly_it(case):
    chosen, wanted = case
    part, small = sub_model(chosen, wanted), sub_settings(chosen, wanted)
    assert small.layers == len(part.layers)
    assert small.hidden_size == part.hidden
    for new, one in enumerate(part.layers):
        own = small.at(new)
        assert (own.heads, own.key_heads, own.head_width) == (one.heads, one.key_heads, chosen.head_width)
        assert small.window_of(new) == chosen.window_of(one.layer)
        assert small.is_moe_layer(new) == chosen.is_moe_layer(one.layer)
        if own.is_moe_layer(new):
            assert (own.moe.experts, own.moe.experts_per_token) == (len(one.experts), one.top_k)
            assert own.moe.expert_size == one.ffn
        else:
            assert own.feed_forward_size == one.ffn
    assert sub_settings(small, Budget()) == small


@settings(max_examples=15)
@given(DECODERS)
def test_a_budget_that_names_everything_is_the_full_one(chosen):
    everything = Budget(ffn=24, heads=4, hidden=16)
    assert sub_model(chosen, everything) == sub_model(chosen, Budget())
    assert sub_settings(chosen, everything) == chosen


def test_budgets_print_as_they_are_written():
    wanted = Budget(ffn=(256, 256, 512), heads=4, skip=[5, 4], experts=(None, 2, (0, 3)))
    assert str(wanted) == "ffn 2x256 512, heads 4, skip 4 5, experts all 2 {0 3}"
    assert Budget.parse("ffn=256+256+512,heads=4,skip=4+5") == Budget(ffn=(256, 256, 512), heads=4, skip=(4, 5))
    assert Budget.parse("full").full


def test_slices_of_gemma_3n_are_budgets():
    """Its official E2B: half of the neurons, layers 20 to 24 of 35 left out."""
    wanted = Budget.of_slices([8192] * 30, range(20, 25))
    assert wanted.skip == (20, 21, 22, 23, 24)
    assert wanted.ffn == (8192,) * 20 + (None,) * 5 + (8192,) * 10
    mixed = Budget.of_slices([4, 8], [1])
    assert [part.ffn for part in sub_model(PLAIN, mixed).layers] == [4, 8]
    with pytest.raises(BudgetError, match="are 3 in all; skip names layer 3"):
        Budget.of_slices([4, 8], [3])


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"ffn": 0}, "leave a layer empty"),
        ({"ffn": 1.5}, "whole number"),
        ({"ffn": True}, "whole number"),
        ({"ffn": []}, "ffn is empty"),
        ({"hidden": [8, 8, 8]}, "hidden has"),
        ({"fnn": 8}, "did you mean 'ffn'"),
        ({"skip": [-1]}, "numbers of layers"),
        ({"experts": [[-1]]}, "numbers of experts"),
    ],
)
def test_what_is_no_budget_is_refused(tree, says):
    with pytest.raises(BudgetError, match=says):
        Budget.from_dict(tree)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Budget(ffn=25), "ffn of layer 0 is 25, and the layer has 24"),
        (Budget(ffn=(8, 8)), "ffn has 2 entries and the model 3 layers"),
        (Budget(skip=(3,)), "skip names layer 3; layers count from 0 to 2"),
        (Budget(skip=(0, 1, 2)), "skip names all 3 layers"),
        (Budget(heads=9), "heads of layer 0 is 9, and the layer has 8"),
        (Budget(heads=3), "cannot share equally: use one of 2, 4, 6, 8"),
        (Budget(heads=5, kv_heads=1), "use one of 1, 2, 3, 4"),
        (Budget(kv_heads=3), "kv_heads of layer 0 is 3, and the layer has 2"),
        (Budget(hidden=17), "hidden is 17, and the model's is 16"),
        (Budget(experts=2), "the model has no experts"),
    ],
)
def test_what_does_not_fit_is_refused(wanted, says):
    model = Decoder(PLAIN)
    with pytest.raises(BudgetError, match=says), budget(model, wanted):
        raise AssertionError("nothing may run")


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Budget(experts=5), "experts of layer 1 is 5, and the layer has 4"),
        (Budget(experts=(1, (4,), 2)), "name expert 4; the layer has 0 to 3"),
        (Budget(experts=2, top_k=3), "top_k of layer 1 is 3, and 2 experts are left"),
    ],
)
def test_experts_that_are_not_there_are_refused(wanted, says):
    with pytest.raises(BudgetError, match=says):
        sub_model(MIXED, wanted)


def test_files_that_hold_no_budget_are_refused(tmp_path):
    for content, says in (("[1]", "holds a list"), ("{", "not valid JSON"), ('{"x": 1}', "has no 'x'")):
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(BudgetError, match=says):
            Budget.parse(str(tmp_path / "b.json"))
    with pytest.raises(BudgetError, match="cannot be read"):
        Budget.parse(str(tmp_path / "nothing.json"))


def test_a_layer_with_adapters_is_not_cut_silently():
    model = Decoder(PLAIN)
    tokens = model.embed.weight.new_zeros(1, 4).long()
    attach(model, {"a": AdapterSettings(method="lora", rank=2, targets=("up",))})
    with budget(model, Budget(ffn=8)), pytest.raises(CutError, match=r"mlp\.up is a AdaptedLinear"):
        model(tokens)
    with budget(model, Budget(skip=(1,))):
        model(tokens)


def test_layers_of_different_sizes_count_as_what_they_are():
    sizes = (LayerSizes(mlp_size=8), LayerSizes(heads=4, kv_heads=1), LayerSizes())
    chosen = DecoderSettings.model_validate({**PLAIN.model_dump(), "layer_sizes": sizes, "head_size": 2})
    model = Decoder(chosen)
    assert [block.mlp.up.weight.shape[0] for block in model.blocks] == [8, 24, 24]
    assert [block.attention.heads for block in model.blocks] == [8, 4, 8]
    alike = Decoder(PLAIN)
    assert step_flops_per_token(model, 8) < step_flops_per_token(alike, 8)
    assert activation_bytes(chosen, 1, 8) < activation_bytes(PLAIN, 1, 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer_sizes": [{}]}, "1 entries"),
        ({"layer_sizes": [{"heads": 3}, {}, {}]}, "not divisible"),
        ({"layer_sizes": [{"heads": 4}, {}, {}]}, "set head_size"),
        ({"layer_sizes": [{"experts": 4}, {}, {}]}, "has no experts"),
    ],
)
def test_impossible_layer_sizes_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        DecoderSettings.model_validate({**PLAIN.model_dump(), **change})


def test_latency_is_measured():
    told = latency(Decoder(PLAIN), Budget(ffn=8), prompt=8, repeats=2)
    assert told.prompt > 0
    assert told.token > 0
