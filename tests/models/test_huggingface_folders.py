"""What stands in the way of loading or saving is named; nothing is quietly ignored."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.huggingface import (
    ModelFolderError,
    config_from_settings,
    load_pretrained,
    save_pretrained,
    settings_from_config,
)

SMALL = {"vocab_size": 50, "hidden_size": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_size": 24}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def same(a: Decoder, b: Decoder) -> bool:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return all(m == n and torch.equal(p, q) for (m, p), (n, q) in pairs)


@pytest.fixture
def model():
    return Decoder(DecoderSettings(**SMALL))


@pytest.fixture
def folder(model, tmp_path):
    save_pretrained(model, tmp_path)
    return tmp_path


def test_a_sharded_folder_holds_the_same_model(model, tmp_path):
    written = save_pretrained(model, tmp_path, max_shard_bytes=3000)
    shards = [path for path in written if path.suffix == ".safetensors"]
    assert len(shards) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert all(sum(t.nbytes for t in load_file(path).values()) <= 3200 for path in shards)
    assert same(load_pretrained(tmp_path), model)


def test_transformers_opens_our_shards_and_we_open_its(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_pretrained(model, tmp_path / "ours", max_shard_bytes=4000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    assert same(load_pretrained(tmp_path / "theirs"), model)


def test_a_second_export_leaves_no_file_of_the_first(model, tmp_path):
    save_pretrained(model, tmp_path, max_shard_bytes=3000)
    save_pretrained(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    save_pretrained(model, tmp_path, max_shard_bytes=3000)
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_can_be_stored_and_loaded_in_bfloat16(model, tmp_path):
    save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_pretrained(tmp_path).embed.weight.dtype == torch.float32
    loaded = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.embed.weight, model.embed.weight.to(torch.bfloat16))


def test_special_ids_and_tokenizer_files_travel_along(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    save_pretrained(model, tmp_path / "out", [tmp_path / "tokenizer.json"], special_ids={"eos_token_id": 7})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 7
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_old_and_fused_names_of_experts_both_load(tmp_path):
    moe = MoESettings(experts=3, expert_size=12, normalise_weights=True)
    for qk_norm in ("none", "rms"):  # Mixtral, Qwen3-MoE
        model = Decoder(DecoderSettings(**SMALL, moe=moe, qk_norm=qk_norm))
        folder = tmp_path / qk_norm
        save_pretrained(model, folder)
        tensors = load_file(folder / "model.safetensors")
        plain = {k: v for k, v in tensors.items() if ".experts." not in k}
        plain = {k.replace("block_sparse_moe", "mlp"): v for k, v in plain.items()}
        for layer, block in enumerate(model.blocks):
            experts, prefix = block.moe.experts, f"model.layers.{layer}.mlp.experts."
            plain[prefix + "gate_up_proj"] = torch.cat([experts.gate, experts.up], 1).detach()
            plain[prefix + "down_proj"] = experts.down.detach().clone()
        save_file(plain, folder / "model.safetensors")
        assert same(load_pretrained(folder), model)


def test_a_tied_head_stored_twice_is_no_error(tmp_path):
    model = Decoder(DecoderSettings(**SMALL, tie_embeddings=True))
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": torch.zeros(50, 16)}, tmp_path / "model.safetensors")
    assert same(load_pretrained(tmp_path), model)


def test_a_pickle_is_refused_with_an_explanation(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelFolderError, match=r"pytorch_model.bin, a pickle; .* runs the code .*save_pretrained"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "weights.bin"])
def test_an_index_cannot_lead_out_of_its_folder(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ModelFolderError, match=r"'model.norm.weight' is said to lie in .* in the same folder"):
        load_pretrained(folder)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_broken_folders_are_described(folder, tmp_path):
    with pytest.raises(ModelFolderError, match="no such folder"):
        load_pretrained(tmp_path / "nowhere")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelFolderError, match="not a whole safetensors file"):
        load_pretrained(folder)
    (folder / "model.safetensors").write_bytes(whole)

    edit(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelFolderError, match=r"nothing, or not all, for 'blocks.1.mlp.up.weight'"):
        load_pretrained(folder)
    (folder / "model.safetensors").write_bytes(whole)

    edit(folder, lambda t: t.update({"model.layers.1.self_attn.sinks": torch.zeros(4)}))
    with pytest.raises(ModelFolderError, match=r"'model.layers.1.self_attn.sinks' is not part of any model family"):
        load_pretrained(folder)
    (folder / "model.safetensors").write_bytes(whole)

    edit(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}))
    with pytest.raises(ModelFolderError, match=r"q_proj.bias' has no place in a model of these settings"):
        load_pretrained(folder)
    (folder / "model.safetensors").write_bytes(whole)

    edit(folder, lambda t: t.update({"model.norm.weight": torch.zeros(17)}))
    with pytest.raises(ModelFolderError, match=r"'model.norm.weight' has shape \(17,\); config.json asks for \(16,\)"):
        load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        load_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama",\n oops}')
    with pytest.raises(ModelFolderError, match=r"not valid JSON.*line 2"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not one of llama, mistral"),
        ({"residual_multiplier": 0.2}, "'residual_multiplier' = 0.2 is not known for model_type 'llama'"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "rope_type 'mrope' is not one of default"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        ({"attention_dropout": 0.1}, "'attention_dropout' is 0.1"),
        ({"pretraining_tp": 2}, "'pretraining_tp' is 2"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
        ({"auto_map": {"AutoModel": "x.py"}}, "its own code, which Resilin does not run"),
        ({"hidden_act": "mish"}, "'hidden_act' is 'mish'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "wobble": 3}}, "wobble"),
        ({"num_attention_heads": None}, "lacks 'num_attention_heads'"),
        ({"num_key_value_heads": 3}, "heads (4) is not divisible by kv_heads (3)"),
    ],
)
def test_config_keys_that_would_change_the_numbers_are_refused_by_name(change, message):
    with pytest.raises(ModelFolderError) as caught:
        settings_from_config({**LLAMA, **change})
    assert message in str(caught.value)


def test_configs_of_transformers_4_and_5_mean_the_same():
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = settings_from_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **llama3}})
    new = settings_from_config(
        {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **llama3}, "torch_dtype": "bfloat16"}
    )
    assert old == new
    assert old.rope_scaling.kind == "llama3"
    assert old.rope_theta == 5e5


@pytest.mark.parametrize(
    ("more", "messages"),
    [
        ({"gated": False, "norm": "layer"}, ["gated = false", 'norm = "layer"']),
        ({"logit_softcap": 30.0}, ["logit_softcap = 30.0"]),
        ({"qk_norm": "layer"}, ['qk_norm = "layer"']),
        ({"qk_norm": "rms", "qk_norm_over": "width"}, ['qk_norm_over = "width"']),
        ({"attention_scale": 0.25}, ["attention_scale = 0.25"]),
        ({"qk_norm": "rms", "mlp_bias": True}, ["qwen3: not with mlp_bias = true", 'llama: not with qk_norm = "rms"']),
        ({"moe": MoESettings(shared_size=8)}, ["moe.shared_size = 8", "qwen2_moe: not with moe.shared_gate = false"]),
    ],
)
def test_settings_that_fit_no_family_are_refused_with_the_reason_and_nothing_is_written(tmp_path, more, messages):
    model = Decoder(DecoderSettings(**SMALL, **more))
    with pytest.raises(ModelFolderError) as caught:
        save_pretrained(model, tmp_path / "out")
    for message in messages:
        assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_each_model_is_exported_to_the_family_that_has_its_parts():
    families = {
        "llama": {},
        "mistral": {"sliding_window": 4},
        "qwen2": {"qkv_bias": True},
        "qwen3": {"qk_norm": "rms"},
        "mixtral": {"moe": MoESettings()},
        "qwen3_moe": {"moe": MoESettings(normalise_weights=False), "qk_norm": "rms"},
        "qwen2_moe": {"moe": MoESettings(shared_size=8, shared_gate=True), "qkv_bias": True},
    }
    for family, more in families.items():
        settings = DecoderSettings(**SMALL, **more)
        config = config_from_settings(settings)
        assert config["model_type"] == family
        assert settings_from_config(json.loads(json.dumps(config))).model_dump() == settings.model_dump() | {
            "mlp_size": settings.mlp_size if family != "mixtral" else settings.moe.expert_size
        }
