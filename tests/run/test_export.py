"""An export opens in transformers as the same model, and never overwrites what it was not asked to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from resilin.data.tokenizer import Tokenizer
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.run.export import ExportError, export_model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(inner.to_str())


@pytest.fixture(scope="module")
def model() -> Decoder:
    settings = DecoderSettings(
        vocab_size=257, hidden_size=16, layers=2, heads=2, kv_heads=1, max_positions=64, rope_theta=5e4, init_std=0.3
    )
    return Decoder(settings, seed=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_opens_an_export_as_the_same_model(
    tmp_path: Path, model: Decoder, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "plain").write_text("")
    export_model(model, tokenizer, tmp_path / "hf", dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    modes = {file.stat().st_mode for file in (tmp_path / "hf").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
    ids = words("To be, or not — to be")["input_ids"]
    assert ids == tokenizer.encode("To be, or not — to be")
    rounded = Decoder(model.settings)
    rounded.load_state_dict({name: value.to(dtype).float() for name, value in model.state_dict().items()})
    with torch.no_grad():
        ours = rounded.logits(rounded(torch.tensor([ids])).hidden_BTD)
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits, ours, atol=1e-5, rtol=1e-5)
    assert theirs.generation_config.eos_token_id == words.eos_token_id == tokenizer.eos_id == 256


def test_a_folder_in_use_is_refused_unless_forced_and_other_files_stay(
    tmp_path: Path, model: Decoder, tokenizer: Tokenizer
) -> None:
    output = tmp_path / "hf"
    output.mkdir()
    (output / "README.md").write_text("mine")
    (output / "model-00001-of-00002.safetensors").write_text("of an older, larger export")
    with pytest.raises(ExportError, match=r"not empty; .* --force"):
        export_model(model, tokenizer, output)
    assert not (output / "config.json").exists()
    files = export_model(model, tokenizer, output, force=True)
    assert (output / "README.md").read_text() == "mine"
    assert {file.name for file in files} == {item.name for item in output.iterdir()} - {"README.md"}
    assert not (output / "model-00001-of-00002.safetensors").exists()
    assert [item.name for item in tmp_path.iterdir()] == ["hf"]


def test_a_model_that_fits_no_family_leaves_nothing_behind(tmp_path: Path, tokenizer: Tokenizer) -> None:
    odd = Decoder(DecoderSettings(vocab_size=257, hidden_size=16, layers=1, heads=2, gated=False))
    with pytest.raises(ExportError, match="gated"):
        export_model(odd, tokenizer, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_read_back_are_not_put_in_place(
    tmp_path: Path, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resilin.run import export

    def other(folder: Path) -> Decoder:
        loaded = export_load(folder)
        with torch.no_grad():
            loaded.norm.weight[0] += 1e-3
        return loaded

    export_load = export.load_pretrained
    monkeypatch.setattr(export, "load_pretrained", other)
    with pytest.raises(ExportError, match=r"norm\.weight reads back differently"):
        export_model(model, tokenizer, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_told(tmp_path: Path, model: Decoder) -> None:
    (tmp_path / "hf").write_text("x")
    with pytest.raises(ExportError, match="is a file"):
        export_model(model, None, tmp_path / "hf", force=True)
