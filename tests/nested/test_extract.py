"""What is taken out opens where models of its kind open, and is read without reading the rest."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from nested_cases import TOKENS, cases, decoder

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings, MoESettings
from resilin.models.huggingface import load_pretrained, save_pretrained
from resilin.models.weight_files import ModelFolderError, StoredTensor
from resilin.nested import Budget, budget, extract, extract_folder
from resilin.run.export import export_model
from resilin.run.open_model import open_model

transformers = pytest.importorskip("transformers")

STOCK = DecoderSettings(vocab_size=37, hidden_size=32, layers=3, heads=8, kv_heads=2, mlp_size=24, init_std=0.4)
FAMILIES = {
    "llama": STOCK,
    "qwen2": STOCK.model_copy(update={"qkv_bias": True, "tie_embeddings": True}),
    "qwen3": STOCK.model_copy(update={"qk_norm": "rms", "head_size": 8}),
    "qwen3_moe": STOCK.model_copy(
        update={"qk_norm": "rms", "head_size": 4, "moe": MoESettings(experts=4, experts_per_token=2, expert_size=24)}
    ),
    "glm4_moe": STOCK.model_copy(
        update={
            "moe": MoESettings(
                experts=4,
                experts_per_token=2,
                expert_size=24,
                routing="sigmoid_topk",
                balance="bias",
                dense_layers=(0,),
            )
        }
    ),
}
# the grouped products of `transformers` want widths of multiples of 16 bytes
UNIFORM = [Budget(ffn=8), Budget(heads=4), Budget(heads=4, kv_heads=2, ffn=12), Budget(hidden=20, skip=(1,), ffn=16)]
MIXED = Budget(ffn=(4, 8, 24), heads=(4, 8, 4), skip=(0,))


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.logits(model(tokens).hidden_BTD)


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_cuts_open_in_transformers(family, tmp_path):
    model, experts = decoder(FAMILIES[family], torch.float32), family.endswith("moe")
    for number, wanted in enumerate([*UNIFORM, *([Budget(experts=3, top_k=1)] if experts else [])]):
        folder = tmp_path / str(number)
        export_model(extract(model, wanted), None, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        # Llama's config wants a width that its heads divide; Mistral computes the same.
        assert theirs.config.model_type in (family, "mistral" if wanted.hidden and family == "llama" else family)
        with torch.no_grad(), budget(model, wanted):
            torch.testing.assert_close(theirs(TOKENS).logits, logits(model), rtol=1e-4, atol=1e-4)


@settings(max_examples=15)
@given(cases())
def test_from_a_folder_it_is_the_same_model(tmp_path_factory, case):
    chosen, wanted = case
    chosen = chosen.model_copy(update={"gated": True, "norm": "rms", "qk_norm": "none", "qk_norm_over": "head"})
    chosen = chosen.model_copy(update={"mlp_bias": False, "out_bias": False, "qkv_bias": False})
    if chosen.moe is not None and chosen.moe.shared_size:
        chosen = chosen.model_copy(update={"moe": chosen.moe.model_copy(update={"shared_gate": True})})
    folder = tmp_path_factory.mktemp("full")
    model = decoder(chosen, torch.float32)
    try:
        save_pretrained(model, folder, max_shard_bytes=5000)
    except ModelFolderError:
        return  # no family has this mixture
    from_disk, from_memory = extract_folder(folder, wanted), extract(load_pretrained(folder), wanted)
    assert from_disk.settings == from_memory.settings
    for (name, one), (_, two) in zip(from_disk.named_parameters(), from_memory.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_no_more_bytes_are_read_than_the_sub_model_has(tmp_path, monkeypatch):
    model = decoder(FAMILIES["qwen3_moe"], torch.float32)
    save_pretrained(model, tmp_path)
    read, part = [], StoredTensor.part
    monkeypatch.setattr(StoredTensor, "part", lambda self, place: read.append(found := part(self, place)) or found)
    small = extract_folder(tmp_path, Budget(ffn=6, experts=2, skip=(1,), heads=4))
    assert sum(tensor.numel() for tensor in read) == sum(p.numel() for p in small.parameters())


def test_layers_of_different_sizes_open_with_our_own_config(tmp_path):
    model = decoder(STOCK, torch.float32)
    export_model(extract(model, MIXED), None, tmp_path / "mixed")
    opened = open_model(tmp_path / "mixed", device="cpu").model
    with budget(model, MIXED):
        torch.testing.assert_close(logits(opened), logits(model), rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert config["model_type"] == "resilin"
    with pytest.raises(ValueError, match="resilin"):
        transformers.AutoConfig.from_pretrained(tmp_path / "mixed")
    again = extract_folder(tmp_path / "mixed", Budget(ffn=4))
    torch.testing.assert_close(logits(again), logits(extract(opened, Budget(ffn=4))))


def test_a_broken_config_of_our_own_is_refused(tmp_path):
    export_model(extract(decoder(STOCK, torch.float32), MIXED), None, tmp_path / "mixed")
    file = tmp_path / "mixed" / "config.json"
    config = json.loads(file.read_text())
    for broken, says in ((None, "needs a table 'settings'"), ({"heads": -1}, "heads"), ({"heads": 2}, "vocab_size")):
        file.write_text(json.dumps({**config, "settings": broken}))
        with pytest.raises(ModelFolderError, match=says):
            load_pretrained(tmp_path / "mixed")


def test_what_is_taken_out_shares_no_memory():
    model = decoder(STOCK)
    small = extract(model, Budget())
    assert isinstance(small, Decoder)
    whole = logits(model)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), whole)
