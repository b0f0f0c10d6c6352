"""Hugging Face folders, written and opened by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from resilin.checkpoint.errors import CheckpointError, DamagedError
from resilin.checkpoint.foreign.convert import Options, convert, open_stored

transformers = pytest.importorskip("transformers")


def _model(tied: bool):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=53,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(20).reshape(2, 10)).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["20KB", "5GB"])
@pytest.mark.parametrize("through", ["resilin", "dcp"])
def test_to_another_format_and_back_gives_the_same_logits(tmp_path, tied, shard, through):
    _model(tied).save_pretrained(tmp_path / "model", max_shard_size=shard)
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 2) == (shard == "20KB")
    convert(tmp_path / "model", tmp_path / "other", Options(target_format=through))
    convert(tmp_path / "other", tmp_path / "again", Options(target_format="huggingface"))
    assert torch.equal(_logits(tmp_path / "again"), _logits(tmp_path / "model"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_shards_with_an_index_open_in_transformers(tmp_path):
    from resilin.checkpoint.foreign.huggingface import write_huggingface

    _model(tied=False).save_pretrained(tmp_path / "model")
    (tmp_path / "cut").mkdir()
    write_huggingface(open_stored(tmp_path / "model"), tmp_path / "cut", 20_000)
    assert len(list((tmp_path / "cut").glob("model-0000*-of-0000*.safetensors"))) > 2
    assert torch.equal(_logits(tmp_path / "cut"), _logits(tmp_path / "model"))


def test_weights_in_another_precision_are_rounded_and_config_says_so(tmp_path):
    _model(tied=False).save_pretrained(tmp_path / "model")
    options = Options(target_format="huggingface", dtype=torch.bfloat16)
    convert(tmp_path / "model", tmp_path / "half", options)
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "half"))
    assert all(torch.equal(half[name], tensor.to(torch.bfloat16)) for name, tensor in whole.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_pickled_weights_are_read_and_written_as_safetensors(tmp_path):
    model = _model(tied=True)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    convert(tmp_path / "model", tmp_path / "safe", Options(target_format="huggingface"))
    assert torch.equal(_logits(tmp_path / "safe"), model(torch.arange(20).reshape(2, 10)).logits)


def test_a_trained_state_needs_the_word_to_leave_its_optimizer_behind(deepspeed_checkpoints, tmp_path):
    options = {"target_format": "huggingface"}
    with pytest.raises(CheckpointError, match=r"no place for 'optimizer/.*--leave-out .* or --weights-only"):
        convert(deepspeed_checkpoints / "1-bf16", tmp_path / "out", Options(**options))
    with pytest.raises(CheckpointError, match=r"needs a config.json.*--files"):
        convert(deepspeed_checkpoints / "1-bf16", tmp_path / "out", Options(**options, weights_only=True))
    assert not (tmp_path / "out").exists()
    _model(tied=True).save_pretrained(tmp_path / "base")
    given = Options(**options, weights_only=True, files=tmp_path / "base")
    report = convert(deepspeed_checkpoints / "1-bf16", tmp_path / "out", given)
    assert {"optimizer/exp_avg/embed.weight", "optimizer/groups", "other/seen"} <= {one.name for one in report.left_out}
    told = load_file(deepspeed_checkpoints / "1-bf16.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, told[f"model/{name}"])


def test_a_missing_shard_and_a_path_that_leads_out_are_refused(tmp_path):
    _model(tied=False).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    file = table["weight_map"]["lm_head.weight"]
    (tmp_path / "model" / file).rename(tmp_path / file)
    with pytest.raises(DamagedError, match=rf"{file}: the file is missing"):
        open_stored(tmp_path / "model")
    table["weight_map"]["lm_head.weight"] = f"../{file}"
    index.write_text(json.dumps(table))
    with pytest.raises(DamagedError, match="leads out of"):
        open_stored(tmp_path / "model")


def test_a_file_name_that_leads_out_of_the_folder_is_not_written(tmp_path):
    from resilin.checkpoint.folder import CheckpointFolder

    files = {"config.json": torch.zeros(2, dtype=torch.uint8), "../out.json": torch.zeros(2, dtype=torch.uint8)}
    CheckpointFolder(tmp_path / "run").save(1, {"model": {"a": torch.ones(2)}, "files": files})
    with pytest.raises(CheckpointError, match=r"'files/../out.json' is no name for a file"):
        convert(tmp_path / "run", tmp_path / "model", Options(target_format="huggingface"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_other_views_of_the_same_memory_are_no_ties(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    a = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": a, "same": a, "turned": a.t(), "flat": a.reshape(-1)}, tmp_path / "model" / "pytorch_model.bin")
    stored = open_stored(tmp_path / "model")
    assert stored.ties == {"model/same": "model/a"}
    convert(tmp_path / "model", tmp_path / "out")
    back = open_stored(tmp_path / "out")
    assert torch.equal(back.tensor("model/turned"), a.t())
    assert torch.equal(back.tensor("model/flat"), a.reshape(-1))
