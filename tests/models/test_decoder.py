from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from resilin.config import SettingsError, parse_settings
from resilin.keys import Keys
from resilin.models.cache import KVCache
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.rope_scaling import DynamicScaling, YarnScaling
from resilin.models.settings import ModelContext

SMALL = {"vocab_size": 61, "hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_size": 40, "init": "fan_in"}
VARIANTS = {
    "plain": {},
    "norms, biases, window": {"qk_norm": "rms", "qkv_bias": True, "sliding_window": 4, "window_layers": (1,)},
    "norms over the width": {"qk_norm": "layer", "qk_norm_over": "width"},
    "softcap": {"attention_softcap": 3.0, "attention_backend": "eager", "logit_softcap": 2.0},
    "layer norm, gelu, tied": {"norm": "layer", "gated": False, "activation": "gelu", "tie_embeddings": True},
    "experts": {"moe": MoESettings(experts=4, expert_size=16, shared_size=8, dense_layers=(0,))},
    "yarn": {"rope_scaling": YarnScaling(factor=4.0, original_max_positions=16)},
}


def build(**more) -> Decoder:
    return Decoder(DecoderSettings(**{**SMALL, **more}), seed=1)


def tokens(batch: int, length: int, seed: int = 0):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, *args, **more):
    return model.logits(model(*args, **more).hidden_BTD)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return build(**VARIANTS[request.param])


@torch.no_grad()
def test_tokens_of_one_document_never_change_the_outputs_of_another(model):
    documents = torch.tensor([[0] * 6 + [1] * 7 + [2] * 5])
    text = tokens(1, 18)
    other = text.clone()
    other[0, 6:13] = tokens(1, 7, 9)[0]
    before, after = (logits(model, t, documents_BT=documents)[0] for t in (text, other))
    outside = torch.tensor([True] * 6 + [False] * 7 + [True] * 5)
    if model.settings.moe is None:
        assert torch.equal(before[outside], after[outside])
    else:  # other tokens change how many rows an expert multiplies at once, and so the last bit
        torch.testing.assert_close(before[outside], after[outside], atol=1e-5, rtol=1e-5)
    assert (before[~outside] - after[~outside]).abs().max() > 1e-3


@torch.no_grad()
def test_packed_documents_give_what_they_give_alone(model):
    lengths = (5, 9, 1)
    parts = [tokens(1, n, n) for n in lengths]
    documents = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    positions = torch.cat([torch.arange(n)[None] for n in lengths], 1)
    packed = logits(model, torch.cat(parts, 1), positions, documents)
    alone = torch.cat([logits(model, part) for part in parts], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(model, side):
    short, long = tokens(1, 4, 4), tokens(1, 9, 9)
    pad = torch.full((1, 5), 60)
    row = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    real = torch.cat(
        [torch.full((1, 5), -1), torch.zeros(1, 4)] if side == "left" else [torch.zeros(1, 4), torch.full((1, 5), -1)],
        1,
    )
    documents = torch.cat([real, torch.zeros(1, 9)]).to(torch.int32)
    positions = torch.cat([((documents[:1] >= 0).cumsum(1) - 1).clamp(min=0), torch.arange(9)[None]])
    out = logits(model, torch.cat([row, long]), positions, documents)
    kept = out[0, 5:] if side == "left" else out[0, :4]
    torch.testing.assert_close(kept, logits(model, short)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[1], logits(model, long)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_any_cutting_of_a_text_over_a_cache_gives_the_logits_of_the_whole(model, cuts):
    text = tokens(2, sum(cuts), 3)
    cache = KVCache.of(model, 2, sum(cuts))
    parts = [logits(model, part, cache=cache) for part in text.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, text), atol=1e-5, rtol=1e-5)
    assert cache.length.tolist() == [sum(cuts)] * 2


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths_decode_as_each_would_alone(model, side):
    lengths, new = (3, 8, 1), 6
    texts = [tokens(1, n + new, n)[0] for n in lengths]
    prompt, documents = torch.full((3, 8), 60), torch.full((3, 8), -1)
    for row, (text, n) in enumerate(zip(texts, lengths, strict=True)):
        place = slice(8 - n, 8) if side == "left" else slice(0, n)
        prompt[row, place], documents[row, place] = text[:n], 0
    cache = KVCache.of(model, 3, 14)
    first = logits(model, prompt, documents_BT=documents, cache=cache)
    assert cache.length.tolist() == list(lengths)
    last = [first[row, 7 if side == "left" else n - 1] for row, n in enumerate(lengths)]
    steps = [torch.stack(last)]
    for step in range(new):
        column = torch.stack([text[n + step] for text, n in zip(texts, lengths, strict=True)])[:, None]
        steps.append(logits(model, column, cache=cache)[:, 0])
    for row, (text, n) in enumerate(zip(texts, lengths, strict=True)):
        want = logits(model, text[None])[0, n - 1 :]
        torch.testing.assert_close(torch.stack(steps)[:, row], want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_keeps_the_rows_it_is_told_to():
    model = build()
    text = tokens(3, 6)
    cache = KVCache.of(model, 3, 8)
    model(text, cache=cache)
    cache.keep_rows(torch.tensor([2, 0]))
    again = logits(model, torch.tensor([[5], [7]]), cache=cache)[:, 0]
    whole = torch.cat([text[[2, 0]], torch.tensor([[5], [7]])], 1)
    torch.testing.assert_close(again, logits(model, whole)[:, -1], atol=1e-5, rtol=1e-5)


def test_a_full_cache_says_how_large_it_should_be():
    model = build()
    cache = KVCache.of(model, 1, 4)
    with torch.no_grad():
        model(tokens(1, 3), cache=cache)
        with pytest.raises(ValueError, match=r"holds 4 tokens a row; 3 are used and 2 more .* 5 or more"):
            model(tokens(1, 2), cache=cache)


@torch.no_grad()
def test_dynamic_scaling_follows_the_longest_position():
    model = build(rope_scaling=DynamicScaling(factor=4.0), max_positions=8)
    text = tokens(1, 20)
    short = logits(model, text[:, :6])
    torch.testing.assert_close(short, logits(build(), text[:, :6]), atol=1e-6, rtol=1e-6)
    assert (logits(model, text) - logits(build(), text)).abs().max() > 1e-3


def test_dropout_does_not_depend_on_the_rest_of_the_micro_batch(model):
    model = Decoder(model.settings.model_copy(update={"dropout": 0.3}), seed=1)
    text, keys = tokens(4, 7), Keys(0, 5, torch.tensor([3, 1, 8, 2]))
    whole = logits(model, text, keys=keys)
    parts = [logits(model, text[i : i + 2], keys=keys.rows(i, i + 2)) for i in (0, 2)]
    torch.testing.assert_close(whole, torch.cat(parts), atol=1e-5, rtol=1e-5)
    assert (whole - logits(model, text)).abs().max() > 0.01
    assert (whole - logits(model, text, keys=Keys(0, 6, keys.slots_B))).abs().max() > 0.01


@pytest.mark.parametrize("length", [9, 70])  # the second is attended in blocks of queries
@pytest.mark.parametrize("kind", ["block", "selective"])
def test_recomputed_activations_give_the_same_gradients(model, kind, length):
    text, keys = tokens(2, length), Keys(0, 0, torch.arange(2))

    def gradients(recompute):
        fresh = Decoder(model.settings.model_copy(update={"recompute": recompute, "dropout": 0.2}), seed=1)
        out = fresh(text, keys=keys)
        total = fresh.logits(out.hidden_BTD).logsumexp(-1).sum()
        (total + sum(router.square().sum() for router in out.router_logits)).backward()
        return [p.grad for p in fresh.parameters()]

    # Where single operations are kept, experts and attention in blocks are computed operation by operation.
    rounded = kind == "selective" and (length > 32 or model.settings.moe is not None)
    for a, b in zip(gradients("none"), gradients(kind), strict=True):
        if rounded:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
        else:
            assert torch.equal(a, b)


def test_soft_caps_follow_their_formula():
    model = build(layers=1, attention_softcap=0.7, attention_backend="eager", logit_softcap=1.5)
    seen = {}
    model.blocks[0].attention.core.register_forward_hook(lambda module, args, out: seen.update(args=args, out=out))
    with torch.no_grad():
        out = model(tokens(1, 6))
        q, k, v, _ = seen["args"]
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        capped = 0.7 * torch.tanh(q @ k.mT / math.sqrt(8) / 0.7)
        capped = capped.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(seen["out"], capped.softmax(-1) @ v)
        raw = out.hidden_BTD @ model.head_weight.T
        torch.testing.assert_close(model.logits(out.hidden_BTD), 1.5 * torch.tanh(raw / 1.5))
        assert model.logits(out.hidden_BTD * 1e3).abs().max() <= 1.5


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("more", [{}, {"attention_softcap": 2.0}, {"sliding_window": 3}])
def test_the_three_backends_agree(more):
    text = tokens(2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    want = logits(build(attention_backend="eager", **more), text, documents_BT=documents)
    others = ["flex"] if "attention_softcap" in more else ["flex", "sdpa"]
    for backend in others:
        model = build(attention_backend=backend, **more)
        torch.testing.assert_close(logits(model, text, documents_BT=documents), want, atol=1e-5, rtol=1e-5)
        cache = KVCache.of(model, 2, 12)
        parts = [logits(model, part, cache=cache) for part in text.split(5, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), logits(model, text), atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), size=st.sampled_from([1e-2, 1.0, 1e3]), kind=st.sampled_from(["rms", "layer"]))
def test_normed_heads_bound_attention_logits_by_sqrt_head_size_times_the_scales(seed, size, kind):
    model = build(layers=1, qk_norm=kind)
    seen = {}
    model.blocks[0].attention.core.register_forward_pre_hook(lambda module, args: seen.update(q=args[0], k=args[1]))
    torch.manual_seed(seed)
    with torch.no_grad():
        for norm in (model.blocks[0].attention.q_norm, model.blocks[0].attention.k_norm):
            norm.weight.uniform_(-2.0, 2.0)
        for projection in (model.blocks[0].attention.q, model.blocks[0].attention.k):
            projection.weight.normal_(0.0, size)
        model(tokens(1, 8, seed))
        scales = [n.weight.abs().max() for n in (model.blocks[0].attention.q_norm, model.blocks[0].attention.k_norm)]
        largest = (seen["q"] @ seen["k"].repeat_interleave(2, 1).mT).abs().max() / math.sqrt(8)
    assert largest <= math.sqrt(8) * scales[0] * scales[1] * (1 + 1e-5)


@torch.no_grad()
def test_queries_and_keys_normed_over_the_width_are_layer_norms_of_whole_rows_and_heads_keep_their_proportions():
    model = build(layers=1, qk_norm="layer", qk_norm_over="width", kv_heads=2)
    attention, seen = model.blocks[0].attention, {}
    attention.q_norm.weight.uniform_(0.5, 2.0)
    attention.q.register_forward_hook(lambda module, args, out: seen.update(projected=out))
    attention.core.register_forward_pre_hook(lambda module, args: seen.update(q_BHTD=args[0], k_BHTD=args[1]))
    model(tokens(2, 1))  # position 0 is not rotated
    x = seen["projected"].double()
    centred = x - x.mean(-1, keepdim=True)
    want = attention.q_norm.weight * centred / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    got = seen["q_BHTD"].transpose(1, 2).reshape(2, 1, 32)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    # All keys of a token together have a mean square of 1, single heads do not.
    assert seen["k_BHTD"].shape == (2, 2, 1, 8)
    squares_BH = seen["k_BHTD"].square().mean((-1, -2))
    torch.testing.assert_close(squares_BH.mean(-1), torch.ones(2), atol=1e-3, rtol=0)
    assert (squares_BH - 1).abs().max() > 0.02


@torch.no_grad()
def test_over_the_width_a_transplant_gives_all_heads_of_a_token_together_the_root_mean_square_sqrt_kappa():
    model, seen = build(layers=1, qk_norm="transplant", qk_norm_kappa=9.0, qk_norm_over="width"), {}
    model.blocks[0].attention.core.register_forward_pre_hook(lambda module, args: seen.update(q_BHTD=args[0]))
    model(tokens(2, 5))
    rms_BT = seen["q_BHTD"].square().mean((1, 3)).sqrt()
    torch.testing.assert_close(rms_BT, torch.full_like(rms_BT, 3.0), rtol=1e-3, atol=0)


def test_a_width_to_norm_over_without_a_norm_is_refused():
    with pytest.raises(ValidationError, match="set qk_norm as well"):
        DecoderSettings(qk_norm_over="width")


@torch.no_grad()
def test_with_normed_heads_a_thousandfold_query_matrix_changes_nothing():
    for kind, over in itertools.product(("rms", "layer"), ("head", "width")):
        model, text = build(qk_norm=kind, qk_norm_over=over, norm_eps=1e-9), tokens(2, 9)
        before = logits(model, text)
        for block in model.blocks:
            block.attention.q.weight.mul_(1000.0)
        torch.testing.assert_close(logits(model, text), before, atol=1e-4, rtol=1e-4)


def test_the_base_model_of_the_small_scale_proxies_can_be_expressed():
    model = Decoder(
        DecoderSettings(
            vocab_size=101,
            hidden_size=64,
            layers=2,
            heads=4,
            gated=False,
            activation="gelu",
            norm="layer",
            norm_eps=1e-6,
            qk_norm="layer",
            init="fan_in",
        )
    )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert not [name for name in shapes if name.endswith("bias")]
    assert shapes["blocks.1.mlp.up.weight"] == (256, 64)
    assert shapes["head.weight"] == shapes["embed.weight"] == (101, 64)
    assert model.blocks[0].attention.core.scale == pytest.approx(0.25)


def test_initial_weights_have_the_variances_asked_for():
    def std(name, **more):
        model = build(hidden_size=128, mlp_size=512, vocab_size=600, **more)
        return float(dict(model.named_parameters())[name].detach().std())

    assert std("embed.weight") == pytest.approx(128**-0.5, rel=0.03)
    assert std("blocks.0.mlp.down.weight") == pytest.approx(512**-0.5, rel=0.03)
    assert std("head.weight") == pytest.approx(128**-0.5, rel=0.03)
    assert std("head.weight", mup_base_size=32) == pytest.approx(32**0.5 / 128, rel=0.03)
    assert std("blocks.0.attention.q.weight", zero_query_init=True) == 0.0
    assert std("blocks.0.attention.k.weight", init="normal", init_std=0.05) == pytest.approx(0.05, rel=0.03)
    cut = build(hidden_size=128, init="fan_in").blocks[0].attention.q.weight.abs().max()
    assert cut <= 2 * 128**-0.5 / 0.8796 + 1e-6


def test_initial_weights_depend_on_seed_and_name_only():
    state = torch.get_rng_state()
    shallow, deep = build(layers=2), build(layers=4, moe=MoESettings(experts=2, expert_size=8, dense_layers=(0, 1)))
    assert torch.equal(state, torch.get_rng_state()), "building a model must not touch the global generator"
    other = dict(deep.named_parameters())
    for name, parameter in shallow.named_parameters():
        assert torch.equal(parameter, other[name]), name
    reseeded = dict(Decoder(shallow.settings, seed=2).named_parameters())
    assert not torch.equal(reseeded["blocks.0.mlp.up.weight"], shallow.blocks[0].mlp.up.weight)
    assert not torch.equal(shallow.blocks[0].mlp.up.weight, shallow.blocks[1].mlp.up.weight)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"hidden_size": 100, "heads": 12}, "hidden_size (100) is not divisible by heads (12): use 96 or 108"),
        ({"heads": 6, "kv_heads": 4, "hidden_size": 48}, "heads (6) is not divisible by kv_heads (4): use 1, 2, 3, 6"),
        ({"attention_softcap": 5.0}, "attention_softcap cannot be computed by attention_backend 'sdpa'"),
        ({"hidden_size": 28, "heads": 4}, "the width of a head (7) should be even"),
        ({"window_layers": [1]}, "set sliding_window to its size"),
        (
            {"sliding_window": 4, "window_layers": [9], "layers": 3},
            "names layer 9, but layers count from 0 to 2",
        ),
        ({"moe": {"dense_layers": [7]}, "layers": 2}, "moe.dense_layers names layer 7"),
        ({"rope_scaling": {"kind": "llama3", "factor": 0.5}}, "greater than or equal to 1"),
        ({"rope_scaling": {"kind": "spiral"}}, "spiral"),
        ({"hiden_size": 4}, "did you mean 'hidden_size'?"),
        ({"activation": "sillu"}, "did you mean 'silu'?"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_settings_that_cannot_be_built_say_what_to_do(tree, message):
    with pytest.raises(SettingsError) as caught:
        parse_settings(DecoderSettings, tree, "run.toml")
    assert message in str(caught.value)


def test_the_vocabulary_comes_from_the_source_where_the_settings_leave_it_open():
    assert DecoderSettings(hidden_size=16, heads=2).build(ModelContext(0, 77)).settings.vocab_size == 77
    assert DecoderSettings(vocab_size=80, hidden_size=16, heads=2).build(ModelContext(0, 77)).settings.vocab_size == 80
    with pytest.raises(ValueError, match=r"model.vocab_size \(60\) is smaller than the tokenizer's \(77\)"):
        DecoderSettings(vocab_size=60).build(ModelContext(0, 77))
    with pytest.raises(ValueError, match="no tokenizer gives it"):
        DecoderSettings().build(ModelContext(0))


def test_settings_are_frozen_and_survive_writing():
    settings_ = DecoderSettings(**SMALL, rope_scaling=YarnScaling(factor=2.0, original_max_positions=64))
    assert DecoderSettings.model_validate(settings_.model_dump(mode="json")) == settings_
    with pytest.raises(ValidationError):
        settings_.layers = 3


def test_autocast_works_forward_and_backward_and_stays_near_float32():
    model, text = build(qk_norm="rms", moe=MoESettings(experts=4, expert_size=16)), tokens(2, 8)
    want = logits(model, text)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model, text)
        got.square().sum().backward()
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 0.1 * want.abs().max()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_per_sample_through_vmap_are_those_of_each_sample_alone():
    model, text = build(qk_norm="rms"), tokens(3, 6)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row[None],)).hidden_BTD.square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, text)
    for row in range(3):
        model.zero_grad()
        model(text[row : row + 1]).hidden_BTD.square().sum().backward()
        for name in ("embed.weight", "blocks.0.attention_norm.weight", "blocks.1.mlp.gate.weight", "norm.weight"):
            torch.testing.assert_close(together[name][row], model.get_parameter(name).grad, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_attention_trains_on_a_gpu_as_plain_products_do():
    text = tokens(2, 256).cuda()
    documents = torch.arange(256, device="cuda")[None].expand(2, 256) // 100
    found = []
    for backend in ("flex", "eager"):
        model = build(hidden_size=128, attention_backend=backend, attention_softcap=5.0, sliding_window=64).cuda()
        model(text, documents_BT=documents).hidden_BTD.square().mean().backward()
        found.append([p.grad for name, p in model.named_parameters() if name != "head.weight"])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
)
@pytest.mark.parametrize("more", [{}, {"norm": "layer", "gated": False, "activation": "gelu", "recompute": "block"}])
def test_the_whole_model_compiles_into_one_graph(backend, more):
    torch.compiler.reset()
    model, text = build(layers=1, qk_norm="rms", **more), tokens(2, 16)
    weights = [p for name, p in model.named_parameters() if name != "head.weight"]
    want = model(text).hidden_BTD
    expected = torch.autograd.grad(want.square().sum(), weights)
    got = torch.compile(model, fullgraph=True, backend=backend)(text).hidden_BTD
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(got.square().sum(), weights), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
