"""A decoder of chains: what the first chains compute, alone or with others behind them."""

from __future__ import annotations

import pytest
import torch
from chain_cases import chain_decoder, chain_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from resilin.config import UserError, parse_settings
from resilin.keys import Keys
from resilin.models.chain_linear import ChainLinear
from resilin.models.chain_modules import ChainHead, scale_logits
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.flops import chain_weights, forward_flops_per_token, parameter_counts
from resilin.models.huggingface import ModelFolderError, config_from_settings, load_pretrained, save_pretrained
from resilin.models.linear import WeightGradients, weight_gradients_later
from resilin.models.mask import training_mask
from resilin.models.rope import rotate, rotation
from resilin.models.step_flops import step_flops_per_token
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.precision.compiled import compile_model

TOKENS = torch.tensor([[1, 5, 9, 2, 30, 4, 11], [3, 3, 36, 7, 0, 12, 8]])


def logits(model, tokens=TOKENS, **more):
    return model.logits(model(tokens, **more).hidden_BTD)


CHAINS = st.builds(
    chain_settings,
    sizes=st.sampled_from([(2, 2), (2, 2, 4), (4, 2), (2, 2, 2, 2)]),
    share_keys=st.booleans(),
    norm=st.sampled_from(["rms", "layer"]),
    qk_norm=st.sampled_from(["none", "rms", "layer", "transplant"]),
    qkv_bias=st.booleans(),
    out_bias=st.booleans(),
    mlp_bias=st.booleans(),
    gated=st.booleans(),
    tie_embeddings=st.booleans(),
    logit_softcap=st.sampled_from([None, 5.0]),
    attention_backend=st.sampled_from(["sdpa", "eager"]),
    dropout=st.sampled_from([0.0, 0.2]),
)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_chain_is_an_ordinary_decoder_bit_for_bit(dropout):
    chosen = chain_settings((8,), dropout=dropout, qk_norm="rms", qkv_bias=True)
    one, plain = Decoder(chosen, seed=5), Decoder(chosen.model_copy(update={"chains": None}), seed=5)
    batch = Batch(torch.arange(2), {"tokens": TOKENS, "labels": TOKENS.roll(-1, 1)})
    losses = [NextToken().build()(model, batch, Keys(1, 2, torch.arange(2))) for model in (one, plain)]
    assert torch.equal(losses[0].sum, losses[1].sum)
    for loss in losses:
        loss.sum.backward()
    gradients = {name.replace(".chains.0.", "."): p.grad for name, p in one.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


@settings(max_examples=25, deadline=None)
@given(CHAINS, st.data())
def test_nothing_reaches_an_earlier_chain(chosen, data):
    """Of every layer, to the bit: what later chains hold is seen by none before them."""
    model, chains = chain_decoder(chosen, torch.float32), len(chosen.chains.sizes)
    changed = data.draw(st.integers(1, chains - 1))
    seen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *call: seen.append(call[2][0] if isinstance(call[2], tuple) else call[2]))
        for block in model.blocks
        for module in (block, block.attention, block.mlp, block.attention_norm, block.mlp_norm)
    ]
    keys = Keys(1, 2, torch.arange(2))
    whole = [model(TOKENS, keys=keys).hidden_BTD, *seen]
    seen.clear()
    for part in model.embed.chains[changed:]:
        torch.nn.init.normal_(part.weight, std=3.0)
    other = [model(TOKENS, keys=keys).hidden_BTD, *seen]
    for hook in hooks:
        hook.remove()
    width = model.norm.reach[changed - 1]
    for before, after in zip(whole, other, strict=True):
        assert torch.equal(before[..., :width], after[..., :width])
        assert not torch.equal(before, after)


@settings(max_examples=25, deadline=None)
@given(CHAINS, st.data())
def test_a_scale_gives_later_chains_no_gradient(chosen, data):
    model, chains = chain_decoder(chosen), len(chosen.chains.sizes)
    scale = data.draw(st.integers(1, chains - 1))
    hidden = model(TOKENS, keys=Keys(1, 2, torch.arange(2))).hidden_BTD[..., : model.norm.reach[scale - 1]]
    model.logits(hidden).square().sum().backward()
    for name, parameter in model.named_parameters():
        chain = int(name.partition(".chains.")[2].partition(".")[0] or 0)
        if chain >= scale:
            assert parameter.grad is None or not parameter.grad.any(), name
        elif name.endswith("weight"):
            assert parameter.grad is not None
            assert parameter.grad.any(), name


def test_chains_may_each_start_as_they_would_alone():
    model = Decoder(chain_settings(), seed=7)
    alone = Decoder(chain_settings((2,), mlp_size=12), seed=7)
    mine = dict(model.named_parameters())
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, mine[name]), name


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.data(),
)
def test_all_ways_to_compute_a_map_agree(sizes, into, out, bias, data):
    """A list of maps, one matrix filled up with zeros, and products whose input's gradient is gathered in place."""
    inputs, outputs = tuple(into * n for n in sizes), tuple(out * n for n in sizes)
    map_ = ChainLinear(inputs, outputs, bias).double()
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for parameter in map_.parameters():
        parameter.data.normal_(generator=generator)
    x = torch.randn(2, 3, sum(inputs), generator=generator, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(2, 3, sum(outputs), generator=generator, dtype=torch.float64)
    whole_bias = torch.cat([one.bias for one in map_.chains]) if bias else None
    listed = torch.cat([one(x[..., :r]) for one, r in zip(map_.chains, map_.reach, strict=True)], -1)
    ways = [map_(x), torch.nn.functional.linear(x, map_.weight, whole_bias), listed]
    wanted = [x, *map_.parameters()]
    gradients = [torch.autograd.grad(way, wanted, pull) for way in ways]
    for way, gradient in zip(ways[1:], gradients[1:], strict=True):
        torch.testing.assert_close(way, ways[0])
        torch.testing.assert_close(gradient, gradients[0])
    upto = data.draw(st.integers(1, len(sizes)))
    width = map_.reach[upto - 1]
    torch.testing.assert_close(map_(x[..., :width]), ways[0][..., : sum(outputs[:upto])])


def test_gradients_of_gradients_of_a_map():
    map_ = ChainLinear((2, 3), (1, 2), True).double()
    for parameter in map_.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(map_, (x,))
    weights = [one.weight for one in map_.chains]

    def of_weights(*parts):
        return torch.func.functional_call(map_, {f"chains.{n}.weight": w for n, w in enumerate(parts)}, (x,))

    assert torch.autograd.gradcheck(of_weights, weights)
    assert torch.autograd.gradgradcheck(of_weights, weights)


def test_weight_gradients_of_chains_can_be_left_for_later():
    model, other = (chain_decoder(chain_settings()) for _ in range(2))
    logits(model).square().sum().backward()
    later = WeightGradients()
    with weight_gradients_later(later):
        total = logits(other).square().sum()
    total.backward()
    later.compute()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_autocast_computes_in_its_format():
    model = chain_decoder(chain_settings(), torch.float32)
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = logits(model)
    rough.sum().backward()
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_logits_of_a_scale_are_those_before_and_what_it_adds():
    model = chain_decoder(chain_settings(tie_embeddings=False))
    assert isinstance(model.head, ChainHead)
    hidden = model(TOKENS).hidden_BTD
    found = list(scale_logits(model.head, hidden))
    assert len(found) == 3
    for scale, one in enumerate(found):
        width = model.norm.reach[scale]
        torch.testing.assert_close(one, hidden[..., :width] @ model.head_weight[:, :width].t())
    assert torch.equal(found[-1], model.logits(hidden))


@pytest.mark.parametrize(
    ("sizes", "share"),
    [((16, 16), 0.75), ((8, 24), 0.8125), ((8, 8, 16), 0.6875), ((8, 8, 8, 8), 0.625), ((4,) * 8, 0.5625)],
)
def test_share_of_a_dense_map(sizes, share):
    """The paper's shares: sum c_i (c_1 + ... + c_i) / (sum c)^2."""
    assert chain_weights(sizes, sizes) / sum(sizes) ** 2 == share
    map_ = ChainLinear(sizes, sizes, False)
    assert sum(p.numel() for p in map_.parameters()) == share * sum(sizes) ** 2


@settings(max_examples=25, deadline=None)
@given(CHAINS)
def test_counts_are_those_of_the_built_model(chosen):
    model = Decoder(chosen, seed=None, device="meta")
    counts = parameter_counts(chosen)
    assert counts.total == sum(p.numel() for p in model.parameters())
    ends = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("embed.", "head.")))
    assert counts.non_embedding == counts.total - ends


@pytest.mark.parametrize("share_keys", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2, 4), (4, 2)])
def test_operations_are_those_that_are_computed(sizes, share_keys):
    chosen = chain_settings(sizes, share_keys, attention_backend="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits(chain_decoder(chosen), torch.zeros(1, 8, dtype=torch.int64))
    # Plain products are made with all keys of a row; told is the mean of those that a token sees, 4.5 of 8.
    unseen = chosen.layers * 4 * chosen.heads * chosen.head_width * (8 - 4.5)
    assert counter.get_total_flops() == 8 * (forward_flops_per_token(chosen, 8) + unseen)


def test_step_operations_know_frozen_chains():
    chosen = chain_settings()
    model = Decoder(chosen, seed=None, device="meta")
    assert step_flops_per_token(model, 8) == pytest.approx(3 * forward_flops_per_token(chosen, 8), rel=1e-9)
    frozen = chain_settings(chains={"sizes": (2, 2, 4), "frozen": 2})
    assert step_flops_per_token(Decoder(frozen, seed=None, device="meta"), 8) < step_flops_per_token(model, 8)


def test_dropout_of_a_scale_is_that_inside_a_larger_one():
    chosen = chain_settings(dropout=0.4)
    model, keys = chain_decoder(chosen), Keys(1, 2, torch.arange(2))
    whole = model(TOKENS, keys=keys).hidden_BTD
    small = chain_decoder(
        DecoderSettings.model_validate(
            chosen.model_dump()
            | {"hidden_size": 16, "heads": 4, "kv_heads": 2, "mlp_size": 24, "chains": {"sizes": (2, 2)}}
        )
    )
    known = dict(model.named_parameters())
    small.load_state_dict({name: known[name] for name, _ in small.named_parameters()})
    torch.testing.assert_close(small(TOKENS, keys=keys).hidden_BTD, whole[..., :16])


@pytest.mark.parametrize(
    "more",
    [{"recompute": "block"}, {"recompute": "selective"}, {"mlp_tiles": 3}, {"recompute": "block", "offload": "disk"}],
    ids=str,
)
@pytest.mark.parametrize("share_keys", [False, True])
def test_ways_to_save_memory_change_no_gradient(more, share_keys):
    chosen = chain_settings(share_keys=share_keys)
    plain, saving = (chain_decoder(chosen.model_copy(update=changes)) for changes in ({}, more))
    for model in (plain, saving):
        logits(model).square().sum().backward()
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


@pytest.mark.slow
def test_compiled_it_computes_the_same():
    model = chain_decoder(chain_settings(), torch.float32)
    expected = logits(model)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert compile_model(model, "blocks", "default") is None
    found = logits(model)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(CHAINS)
def test_a_folder_gives_the_same_bits_back(tmp_path_factory, chosen):
    folder = tmp_path_factory.mktemp("chains")
    model = chain_decoder(chosen, torch.float32)
    save_pretrained(model, folder)
    again = load_pretrained(folder)
    assert again.settings == chosen
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ModelFolderError, match="chains"):
        config_from_settings(chosen, "float32", None)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"heads": 6, "head_size": 4, "kv_heads": 2}, "8 query heads together, and heads is 6"),
        ({"hidden_size": 34, "head_size": 4}, "multiple of 8"),
        ({"kv_heads": 1}, "chains.share_keys"),
        ({"mlp_size": 50}, "or give chains.mlp_sizes"),
        ({"chains": {"sizes": (2, 2, 4), "mlp_sizes": (1, 2, 3)}}, "6 neurons together"),
        ({"chains": {"sizes": (2, 2, 4), "mlp_sizes": (24, 24)}}, "2 entries for 3 chains"),
        ({"chains": {"sizes": (2, 2, 4), "frozen": 3}}, "nothing is left to train"),
        ({"chains": {"sizes": ()}}, "query heads of each chain"),
        ({"chains": {"sizes": (2, 2, 4), "share_keys": True}}, "no multiple of the 4 kv_heads"),
        ({"moe": {}, "mlp_size": 48}, "a router reads all chains"),
        ({"layer_sizes": ({}, {})}, "layer_sizes"),
        ({"loop": {}}, "use loop.condition = 'none'"),
        ({"qk_norm": "rms", "qk_norm_over": "width"}, "use 'head'"),
        ({"norm_place": "after"}, "use 'before'"),
        ({"mup_base_size": 8}, "mup_base_size"),
    ],
)
def test_what_cannot_be_divided_is_refused(more, said):
    tree = chain_settings().model_dump() | more
    with pytest.raises(UserError) as error:
        parse_settings(DecoderSettings, tree, "here")
    assert said in str(error.value)


def test_neurons_can_be_told_for_each_chain():
    chosen = chain_settings(mlp_size=33, chains={"sizes": (2, 2, 4), "mlp_sizes": (5, 8, 20)})
    model = chain_decoder(chosen)
    assert [one.weight.shape[0] for one in model.blocks[0].mlp.up.chains] == [5, 8, 20]
    logits(model)


def test_a_plain_loop_may_have_chains():
    chosen = chain_settings(loop={"times": 2, "condition": "none"})
    model = chain_decoder(chosen)
    hidden = model(TOKENS).hidden_BTD
    torch.nn.init.normal_(model.embed.chains[2].weight)
    assert torch.equal(model(TOKENS).hidden_BTD[..., :16], hidden[..., :16])


def test_tensor_parallelism_is_refused_by_name():
    with pytest.raises(UserError, match=r"model\.chains"):
        chain_decoder(chain_settings()).tensor_plan()


def test_a_width_between_scales_is_refused():
    model = chain_decoder(chain_settings())
    with pytest.raises(ValueError, match="chains end at the widths 8, 16, 32, and the input is 12 wide"):
        model.blocks[0].attention.q(torch.zeros(1, 12, dtype=torch.float64))


@pytest.mark.parametrize("share_keys", [False, True])
def test_scales_share_out_key_heads_as_ordinary_decoders_do(share_keys):
    """The first chain read as an ordinary grouped-query decoder computes the same, in every chain's presence."""
    sizes = (4, 4) if share_keys else (4, 4, 8)
    model = chain_decoder(chain_settings(sizes, share_keys))
    plain = chain_decoder(chain_settings((4,), kv_heads=2).model_copy(update={"chains": None}))
    known = {name.replace(".chains.0.", "."): p for name, p in model.named_parameters() if ".chains.1" not in name}
    plain.load_state_dict({name: known[name] for name, _ in plain.named_parameters()})
    torch.testing.assert_close(model(TOKENS).hidden_BTD[..., :16], plain(TOKENS).hidden_BTD)


def test_shared_keys_are_read_by_the_same_heads_in_every_chain():
    """Against products written out: chain by chain, head j of m * K reads key head j // m."""
    model = chain_decoder(chain_settings((4, 2), True))
    attention, x = model.blocks[0].attention, torch.randn(1, 5, 24, dtype=torch.float64)
    caught = {}
    attention.core.register_forward_pre_hook(lambda _, args: caught.update(k=args[1], v=args[2]))
    attention.o.register_forward_pre_hook(lambda _, args: caught.update(mixed=args[0]))
    turn = rotation(model.settings, torch.arange(5), 5)
    attention(x, turn, training_mask(None, 5, None, x.device))
    k, v = caught["k"], caught["v"]
    q = rotate(attention.q(x).view(1, 5, 6, 4), turn).transpose(1, 2)
    parts = []
    for head, key in zip(range(6), (0, 0, 1, 1, 0, 1), strict=True):
        weights = (q[:, head] @ k[:, key].transpose(1, 2) / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        parts.append(weights.softmax(-1) @ v[:, key])
    torch.testing.assert_close(caught["mixed"], torch.cat(parts, -1))
