"""A looped decoder: blocks run several times, told of time and step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looped_cases import looped_settings
from torch.utils.flop_counter import FlopCounterMode

from resilin.config import parse_settings
from resilin.config.errors import SettingsError
from resilin.keys import Keys
from resilin.models.cache import KVCache
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.flops import forward_flops_per_token, parameter_counts, train_flops_per_token
from resilin.models.huggingface import ModelFolderError, config_from_settings, load_pretrained, save_pretrained
from resilin.models.loop import sinusoids
from resilin.models.loop_settings import LoopSettings
from resilin.models.memory import activation_bytes
from resilin.models.norm import rms_norm
from resilin.models.step_flops import step_flops_per_token
from resilin.precision.compiled import compile_model

TOKENS = torch.tensor([[1, 5, 9, 2, 30, 4, 11], [3, 3, 36, 7, 0, 12, 8]])
CONDITIONS = ("time_and_step", "index", "none")


def looped(times: int = 3, dtype=torch.float64, more=None, **loop) -> Decoder:
    return Decoder(looped_settings(LoopSettings(times=times, start="small", **loop), **(more or {})), seed=3).to(dtype)


def logits(model, tokens=TOKENS, **more):
    return model.logits(model(tokens, **more).hidden_BTD)


LOOPS = st.builds(
    LoopSettings,
    times=st.integers(1, 4),
    condition=st.sampled_from(CONDITIONS),
    time_scale=st.sampled_from([1.0, 100.0]),
    frequencies=st.sampled_from([4, 256]),
    start=st.sampled_from(["identity", "small"]),
)


def test_a_told_loop_is_what_the_paper_writes():
    """Against the formulas, written out: sinusoids of raw times, two embedders, gates and scales, no norm weights."""
    model = looped(3, condition="time_and_step", steps=(2, 1, 1), more={"qkv_bias": False})
    eps, seen = model.settings.norm_eps, []
    blocks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in model.blocks]
    states = model(TOKENS).hidden_BTD
    for hook in blocks:
        hook.remove()

    def phi(embedder, value):
        speeds = [math.exp(-math.log(10000) * j / 128) for j in range(128)]
        x = torch.tensor(
            [math.cos(value * s) for s in speeds] + [math.sin(value * s) for s in speeds], dtype=torch.float64
        )
        x = torch.nn.functional.silu(embedder.up.weight @ x + embedder.up.bias)
        return embedder.down.weight @ x + embedder.down.bias

    turn, mask = captured(model)
    h = model.embed(TOKENS)
    for number, (t, d) in enumerate([(0.0, 0.5), (0.5, 0.25), (0.75, 0.25)]):
        c = phi(model.loop.time, t) + phi(model.loop.step, d)
        for layer, block in enumerate(model.blocks):
            torch.testing.assert_close(seen[2 * number + layer], h, rtol=1e-9, atol=1e-12)
            ga, gm, sa, sm = (block.modulation.weight @ torch.nn.functional.silu(c) + block.modulation.bias).chunk(4)
            one = torch.ones(16, dtype=torch.float64)
            h = h + ga * block.attention(rms_norm(h, one, eps) * (1 + sa), turn, mask)
            h = h + gm * block.mlp(rms_norm(h, one, eps) * (1 + sm))
    torch.testing.assert_close(states, model.norm(h), rtol=1e-9, atol=1e-12)


def captured(model):
    found = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: found.append(args[1:3]))
    model(TOKENS)
    hook.remove()
    return found[0]


def test_sinusoids_are_of_raw_times():
    x = sinusoids(torch.tensor([0.0, 0.5]), 4)
    expected = [[1, 1, 0, 0], [math.cos(0.5), math.cos(0.005), math.sin(0.5), math.sin(0.005)]]
    torch.testing.assert_close(x, torch.tensor(expected, dtype=torch.float64))


def test_one_loop_that_is_told_nothing_is_the_plain_decoder_bit_for_bit():
    for more in ({}, {"dropout": 0.2}, {"moe": MoESettings(experts=4, expert_size=8)}):
        plain = Decoder(looped_settings(None, **more), seed=3)
        once = Decoder(looped_settings(LoopSettings(times=1, condition="none"), **more), seed=3)
        keys = Keys(0, 1, torch.arange(2))
        found = []
        for model in (plain, once):
            out = logits(model, keys=keys)
            out.square().sum().backward()
            found.append((out, [p.grad for p in model.parameters()]))
        assert torch.equal(found[0][0], found[1][0])
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_loops_that_are_told_nothing_are_as_many_layers_with_the_same_weights():
    model, deep = looped(3, condition="none"), Decoder(looped_settings(None, layers=6), seed=0).double()
    for name, parameter in deep.named_parameters():
        match name.split("."):
            case ["blocks", layer, *rest]:
                name = ".".join(["blocks", str(int(layer) % 2), *rest])
        parameter.data.copy_(dict(model.named_parameters())[name])
    assert torch.equal(logits(model), logits(deep))


def test_with_a_constant_condition_it_is_the_plain_loop():
    """Gates 1 and scales 0, whatever the time: Base-Loop, whose norm weights are 1."""
    told, plain = looped(3), looped(3, condition="none")
    with torch.no_grad():
        for block in told.blocks:
            block.modulation.weight.zero_()
            block.modulation.bias.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat_interleave(16))
    told.load_state_dict({n: p for n, p in plain.state_dict().items() if "_norm." not in n}, strict=False)
    assert torch.equal(logits(told), logits(plain))


@pytest.mark.parametrize("condition", ["time_and_step", "index"])
def test_it_starts_as_the_identity_unless_it_starts_small(condition):
    model = Decoder(looped_settings(LoopSettings(times=4, condition=condition)), seed=3)
    assert torch.equal(model(TOKENS).hidden_BTD, model.norm(model.embed(TOKENS)))
    small = Decoder(looped_settings(LoopSettings(times=4, condition=condition, start="small"), hidden_size=64), seed=3)
    assert float(small.blocks[0].modulation.weight.detach().std()) == pytest.approx(0.3, rel=0.05)
    assert float(small.blocks[1].attention.o.weight.detach().std()) == pytest.approx(0.3 / 2, rel=0.05)
    assert float(small.blocks[1].mlp.down.weight.detach().std()) == pytest.approx(0.3 / 2, rel=0.1)
    assert float(small.blocks[1].mlp.up.weight.detach().std()) == pytest.approx(0.3, rel=0.1)
    logits(model).square().sum().backward()
    assert model.blocks[0].modulation.bias.grad[:32].abs().min() > 0  # gates learn from the first step


@settings(max_examples=30, deadline=None)
@given(LOOPS, st.booleans(), st.booleans())
def test_a_cache_changes_nothing(loop, windowed, mixture):
    more = {
        "sliding_window": 3 if windowed else None,
        "moe": MoESettings(experts=4, expert_size=8) if mixture else None,
    }
    model = Decoder(looped_settings(loop, **more), seed=3).double()
    with torch.no_grad():
        whole, cache = logits(model), KVCache.of(model, 2, 8)
        assert len(cache.keys_LBKCD) == 2 * loop.times
        parts = [logits(model, part, cache=cache) for part in (TOKENS[:, :4], TOKENS[:, 4:5], TOKENS[:, 5:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(LOOPS, st.booleans(), st.sampled_from([None, MoESettings(experts=4, expert_size=8, shared_size=8)]))
def test_parameters_and_operations_are_counted_exactly(loop, tie, moe):
    chosen = looped_settings(loop, tie_embeddings=tie, moe=moe)
    model = Decoder(chosen, seed=None, device="meta")
    held = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = parameter_counts(chosen)
    assert counts.total == sum(held.values())
    assert counts.non_embedding == sum(n for name, n in held.items() if name not in ("embed.weight", "head.weight"))
    once = parameter_counts(looped_settings(loop.model_copy(update={"times": 1}), tie_embeddings=tie, moe=moe))
    assert counts == once  # however many loops
    flops = [forward_flops_per_token(looped_settings(loop.model_copy(update={"times": m})), 9) for m in (1, 2, 3)]
    assert flops[2] - flops[1] == flops[1] - flops[0] > 0


@pytest.mark.parametrize("condition", CONDITIONS)
def test_operations_are_those_that_torch_counts(condition):
    model = looped(3, torch.float32, condition=condition, more={"attention_backend": "eager"})
    rows, width, loops, layers = 5, 16, 3, 2
    embedders = {"time_and_step": 2, "index": 1, "none": 0}[condition]
    # one vector a loop: not counted, as it costs the same for any number of tokens
    told = 2 * loops * embedders * (256 * width + width * width)
    told += 2 * loops * layers * 4 * width * width if condition != "none" else 0
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits(model, torch.zeros(rows, 1, dtype=torch.int64))
    assert counter.get_total_flops() == rows * forward_flops_per_token(model.settings, 1) + told
    assert step_flops_per_token(model, 20) == pytest.approx(train_flops_per_token(model.settings, 20), rel=1e-12)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("more", [{"recompute": "block"}, {"recompute": "selective"}, {"mlp_tiles": 2}], ids=str)
def test_computing_again_gives_the_same_gradients(condition, more):
    tokens, found = TOKENS.repeat(1, 3), []
    for chosen in ({}, more):
        model = looped(3, condition=condition, more={**chosen, "dropout": 0.1})
        logits(model, tokens, keys=Keys(0, 2, torch.arange(2))).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-9, atol=1e-12)


def test_each_loop_drops_other_values():
    model, seen = looped(2, condition="none", more={"dropout": 0.5, "layers": 1}), []
    model.blocks[0].mlp.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    model.blocks[0].attention.register_forward_hook(lambda _, __, out: torch.ones_like(out))
    model.blocks[0].register_forward_hook(lambda _, args, out: seen.append(out[0] - args[0]))
    model(TOKENS, keys=Keys(0, 0, torch.arange(2)))
    assert (seen[0] != 0).float().mean() == pytest.approx(0.5, abs=0.15)
    assert not torch.equal(seen[0] != 0, seen[1] != 0)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_compiled_blocks_compute_the_same(condition):
    model = looped(3, condition=condition)
    expected = logits(model)
    compile_model(model, "blocks", "default", backend="aot_eager")
    torch.testing.assert_close(logits(model), expected)


def test_a_mixture_in_loops_has_routers_for_every_loop():
    model = looped(3, more={"moe": MoESettings(experts=4, expert_size=8)})
    assert len(model(TOKENS).router_logits) == 6


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("moe", [None, MoESettings(experts=4, expert_size=8)])
def test_saved_and_opened_it_is_the_same(tmp_path, condition, moe):
    steps = (3, 1, 1) if condition == "time_and_step" else ()
    model = looped(3, torch.float32, condition=condition, steps=steps, more={"moe": moe})
    save_pretrained(model, tmp_path / "folder")
    again = load_pretrained(tmp_path / "folder")
    assert again.settings == model.settings
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ModelFolderError, match="blocks are run once"):
        config_from_settings(model.settings)


def test_activations_are_estimated_for_all_loops():
    def kept(**more):
        chosen = looped_settings(LoopSettings(times=more.pop("times"), condition="none"), **more)
        return activation_bytes(chosen, 2, 8)

    for recompute in ("none", "selective", "block"):
        one, two, three = (kept(times=n, recompute=recompute) for n in (1, 2, 3))
        assert three - two == two - one > 0
    deep = activation_bytes(looped_settings(None, layers=6), 2, 8)
    assert kept(times=3) == deep


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"times": 0}, "greater than 0"),
        ({"steps": [1, 2]}, "2 entries for 8 loops"),
        ({"times": 2, "steps": [1, 2], "condition": "none"}, "do not know of steps"),
        ({"frequencies": 3}, "multiple of 2"),
        ({"condition": "times"}, "condition"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tree, says):
    with pytest.raises(SettingsError, match=says):
        parse_settings(DecoderSettings, {"loop": tree}, "x.toml")


def test_what_a_block_makes_of_a_loop_is_made_once_for_a_text():
    model, calls = looped(3), []
    for block in model.blocks:
        block.modulation.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for _ in range(2):  # every text anew: weights may have changed
            calls.clear()
            cache = KVCache.of(model, 2, 8)
            for place in range(7):
                logits(model, TOKENS[:, place : place + 1], cache=cache)
            assert len(calls) == 3 * 2
    calls.clear()
    cache = KVCache.of(model, 2, 8)
    for part in (TOKENS[:, :4], TOKENS[:, 4:]):  # with gradients nothing is kept
        logits(model, part, cache=cache)
    assert len(calls) == 2 * 3 * 2


@pytest.mark.slow
def test_compiled_blocks_read_a_cache():
    model = looped(3)
    expected = logits(model)
    compile_model(model, "blocks", "default", backend="aot_eager")
    with torch.no_grad():
        cache = KVCache.of(model, 2, 8)
        parts = [logits(model, part, cache=cache) for part in (TOKENS[:, :4], TOKENS[:, 4:5], TOKENS[:, 5:])]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-9, atol=1e-9)
