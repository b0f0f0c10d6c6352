"""A decoder of Mamba-2, attention and feed-forward layers."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from commands import run_command
from hybrid_cases import hybrid, hybrid_settings
from kept_memory import kept_bytes
from torch.utils.flop_counter import FlopCounterMode

from resilin.models.cache import KVCache
from resilin.models.flops import forward_flops_per_token, parameter_counts, train_flops_per_token
from resilin.models.huggingface import load_pretrained, save_pretrained
from resilin.models.hybrid import HybridDecoder
from resilin.models.memory import activation_bytes
from resilin.models.pretrained import Pretrained
from resilin.models.settings import ModelContext
from resilin.models.step_flops import step_flops_per_token
from resilin.models.weight_files import ModelFolderError
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken

TOKENS = torch.randint(37, (2, 11), generator=torch.Generator().manual_seed(1))


def logits(model, tokens=TOKENS, **more):
    return model.logits(model(tokens, **more).hidden_BTD)


def by_the_recurrence(layer, u):
    """A Mamba-2 layer written down token by token."""
    z, x, B, C, dt = (one(u[0]) for one in (layer.z, layer.x, layer.B, layer.C, layer.dt))
    T, joined = len(x), torch.cat([x, B, C], -1)
    weight = torch.cat([one.weight for one in (layer.conv_x, layer.conv_B, layer.conv_C)])[:, 0]
    bias = torch.cat([one.bias for one in (layer.conv_x, layer.conv_B, layer.conv_C)])
    mixed = torch.zeros_like(joined)
    for t in range(T):
        for back in range(weight.shape[1]):
            if t >= back:
                mixed[t] += joined[t - back] * weight[:, -1 - back]
    x, B, C = F.silu(mixed + bias).split([x.shape[-1], B.shape[-1], C.shape[-1]], -1)
    H, G = layer.heads, layer.groups
    x, B, C = x.view(T, H, -1), B.view(T, G, -1), C.view(T, G, -1)
    dt = F.softplus(dt + layer.dt_bias).clamp(min=layer.dt_min)
    y, state = torch.zeros_like(x), torch.zeros(H, x.shape[-1], B.shape[-1], dtype=x.dtype)
    for t in range(T):
        for h in range(H):
            g = h // (H // G)
            decay = torch.exp(-dt[t, h] * layer.A_log[h].exp())
            state[h] = decay * state[h] + dt[t, h] * torch.outer(x[t, h], B[t, g])
            y[t, h] = state[h] @ C[t, g] + layer.D[h] * x[t, h]
    y = (y.reshape(T, -1) * F.silu(z)).view(T, G, -1)
    y = y / (y.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()
    return layer.out(y.view(T, -1) * layer.norm.weight)[None]


@torch.no_grad()
def test_a_mamba_layer_is_its_recurrence():
    model = hybrid()
    u = torch.randn(1, 11, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        model.blocks[0].mamba(u), by_the_recurrence(model.blocks[0].mamba, u), rtol=0, atol=1e-10
    )


@torch.no_grad()
def test_documents_of_a_packed_row_are_read_as_if_alone():
    model = hybrid()
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2], [3, 3, 3, 3, 3, 3, 3, 3, -1, -1, -1]])
    packed = logits(model, documents_BT=documents)
    for row, part in ((0, slice(0, 4)), (0, slice(4, 7)), (0, slice(7, 11)), (1, slice(0, 8))):
        alone = logits(model, TOKENS[row : row + 1, part])
        torch.testing.assert_close(packed[row : row + 1, part], alone, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(11,), (1,) * 11, (5, 1, 4, 1)], ids=str)
def test_with_a_cache_it_is_the_same(pieces):
    model = hybrid()
    cache = KVCache.of(model, 2, 12)
    found = torch.cat([logits(model, part, cache=cache) for part in TOKENS.split(pieces, 1)], 1)
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_states_alone(side):
    model = hybrid()
    cache = KVCache.of(model, 2, 12)
    real = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    real = real.flip(1) if side == "left" else real
    padded = torch.zeros(2, 5, dtype=torch.int64)
    padded[0], padded[1, real[1]] = TOKENS[0, :5], TOKENS[1, :2]
    logits(model, padded, documents_BT=torch.where(real, 0, -1), cache=cache)
    following = logits(model, TOKENS[:, 7:8], cache=cache)
    want = [
        logits(model, torch.cat([TOKENS[i : i + 1, :n], TOKENS[i : i + 1, 7:8]], 1))[:, -1:]
        for i, n in ((0, 5), (1, 2))
    ]
    torch.testing.assert_close(following, torch.cat(want), rtol=0, atol=1e-10)


@torch.no_grad()
def test_rows_of_a_cache_can_be_kept_freed_and_filled():
    model = hybrid()
    cache, other = KVCache.of(model, 2, 12), KVCache.of(model, 1, 12)
    logits(model, TOKENS[:, :4], cache=cache)
    logits(model, TOKENS[1:, 3:9], cache=other)
    cache.free(torch.tensor([0]))
    cache.fill(torch.tensor([0]), other, torch.tensor([0]), 6)
    cache.keep_rows(torch.tensor([1, 0]))
    found = logits(model, TOKENS[:, 9:10], cache=cache)
    first = logits(model, torch.cat([TOKENS[1:, :4], TOKENS[:1, 9:10]], 1))[:, -1]
    second = logits(model, torch.cat([TOKENS[1:, 3:9], TOKENS[1:, 9:10]], 1))[:, -1]
    torch.testing.assert_close(found[:, 0], torch.cat([first, second]), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="read the text anew"):
        cache.take_back(1)
    with pytest.raises(ValueError, match="cut to 3"):
        cache.fill(torch.tensor([0]), other, torch.tensor([0]), 3)


@pytest.mark.parametrize("kind", ["block", "selective"])
def test_recomputing_changes_no_gradient(kind):
    batch = Batch(
        torch.arange(2), {"tokens": TOKENS, "labels": TOKENS.roll(-1, 1), "documents": torch.zeros_like(TOKENS)}
    )
    found = []
    for recompute in ("none", kind):
        model = hybrid(recompute=recompute)
        NextToken().build()(model, batch, None).sum.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_initial_weights_are_a_function_of_seed_and_name():
    one, again = HybridDecoder(hybrid_settings(), seed=1), HybridDecoder(hybrid_settings(pattern="M-*M*"), seed=1)
    other = dict(again.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other[name]), name
    mamba = one.blocks[0].mamba
    steps = F.softplus(mamba.dt_bias)
    assert ((steps > 0.0009) & (steps < 0.11)).all()
    assert ((mamba.A_log.exp() >= 1) & (mamba.A_log.exp() <= 16)).all()


def test_counts_are_those_of_the_module_and_of_torch():
    model = hybrid(torch.float32, attention_backend="eager", mamba={"conv_bias": False})
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    counts = parameter_counts(model.settings)
    assert counts.total == counts.active == sum(sizes.values())
    assert counts.non_embedding == counts.total - 2 * sizes["embed.weight"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits(model, TOKENS[:, :1], cache=KVCache.of(model, 2, 1))  # one token, which sees itself
    # torch counts no convolution that is written as products and sums, and of the state only that it is read
    mamba = model.settings.mamba
    convolution, update = 2 * 4 * (mamba.width + 2 * mamba.state_width), 2 * mamba.width * mamba.state_size
    assert forward_flops_per_token(model.settings, 1) == counter.get_total_flops() / 2 + 2 * (convolution + update)
    assert step_flops_per_token(model, 9) == pytest.approx(train_flops_per_token(model.settings, 9), rel=1e-12)


@pytest.mark.parametrize("pattern", ["MM", "M-*"])
def test_estimated_activations_are_what_autograd_keeps(pattern):
    chosen = hybrid_settings(
        hidden_size=64, pattern=pattern, mlp_size=96, mamba={"heads": 8, "head_size": 16, "state_size": 24, "chunk": 32}
    )
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    estimate = activation_bytes(chosen, 2, 64, logit_rows=0)
    assert estimate == pytest.approx(kept_bytes(HybridDecoder(chosen), tokens), rel=0.12)


def test_a_cache_has_keys_of_attention_layers_and_states_of_the_others():
    model = hybrid(torch.float32)
    cache = KVCache.of(model, 3, 9)
    assert cache.keys_LBKCD.shape == (1, 3, 2, 10, 4)
    assert cache.states.conv_LBKC.shape == (2, 3, 3, 24 + 2 * 10)
    assert cache.states.state_LBHPN.shape == (2, 3, 4, 6, 5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"pattern": "MEM"}, "experts are not supported"),
        ({"pattern": "MxM"}, "known are M"),
        ({"layers": 2}, "leave layers out"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"mamba": {"heads": 5, "groups": 2}}, "not divisible by mamba.groups"),
        ({"mamba": {"dt_min": 1.0}}, "dt_max"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(more, words):
    with pytest.raises(ValueError, match=words):
        hybrid_settings(**more)


def test_documents_that_go_on_from_others_are_refused():
    documents = torch.zeros_like(TOKENS)
    with pytest.raises(ValueError, match="go on from others"):
        hybrid()(TOKENS, None, documents, continues_BT=torch.full_like(TOKENS, -1))


def test_logits_are_those_of_transformers_in_both_directions(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(
        vocab_size=61,
        hidden_size=32,
        layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=40,
        ssm_state_size=8,
        mamba_num_heads=6,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=4,
    )
    theirs = transformers.NemotronHForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, tokens = load_pretrained(tmp_path / "theirs"), torch.arange(26).view(2, 13)
    with torch.no_grad():
        want = theirs(tokens).logits
        torch.testing.assert_close(logits(mine, tokens), want, rtol=1e-5, atol=1e-5)
        save_pretrained(mine, tmp_path / "mine")
        again = transformers.NemotronHForCausalLM.from_pretrained(tmp_path / "mine")
        assert torch.equal(again(tokens).logits, want)
    assert isinstance(Pretrained(path=tmp_path / "mine").build(ModelContext(0)), HybridDecoder)


def test_old_patterns_are_read_and_unknown_keys_refused(tmp_path):
    model = hybrid(torch.float32)
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["layers_block_type"]
    config["hybrid_override_pattern"] = "M-*M"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_pretrained(tmp_path)), logits(model))
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_bias": True}))
    with pytest.raises(ModelFolderError, match="use_bias"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hybrid_override_pattern": "MEM*"}))
    with pytest.raises(ModelFolderError, match="experts"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "more",
    [{"tie_embeddings": True}, {"layer_sizes": [{"mamba_heads": 2, "state_size": 3}, {"mlp_size": 8}, {}, {}]}],
    ids=str,
)
def test_what_no_family_has_keeps_a_config_of_our_own(more, tmp_path):
    model = hybrid(torch.float32, **more)
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.settings == model.settings
    assert torch.equal(logits(again), logits(model))


def test_a_run_trains_one_and_its_export_generates(tmp_path):
    lines = [json.dumps({"text": "the cat sat"[: 4 + n % 8]}) for n in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "run.toml").write_text(
        """
name = "hybrid"
train = { steps = 6, batch_size = 4, device = "cpu", threads = 1 }
optimizer.lr = 1e-2
log.tensorboard = false
[source]
use = "resilin.data.text_source:TextSource"
paths = ["text.jsonl"]
sequence_length = 16
packing = "documents"
tokenizer.kind = "bytes"
held_out.by = "tail"
[model]
use = "resilin.models.hybrid_settings:HybridSettings"
hidden_size = 16
pattern = "M-*"
heads = 2
mlp_size = 32
max_positions = 64
recompute = "block"
mamba = { heads = 4, head_size = 8, groups = 2, state_size = 8, chunk = 8 }
"""
    )
    done = run_command(tmp_path, ("train", "run.toml"))
    assert done.returncode == 0, done.stderr
    done = run_command(tmp_path, ("export", "runs/hybrid", "folder"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "folder/config.json").read_text())["model_type"] == "nemotron_h"
    asked = ("generate", "folder", "--prompt", "the cat", "--max-new-tokens", "5", "--temperature", "0")
    done = run_command(tmp_path, asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat")
