"""A model is opened from wherever it lies; what cannot be opened is told with what was looked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from resilin.checkpoint.folder import CheckpointFolder
from resilin.config import UserError
from resilin.data.tokenizer import Tokenizer
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface import save_pretrained
from resilin.run.open_model import OpenModelError, open_model

SIZES = {"hidden_size": 16, "layers": 2, "heads": 2, "max_positions": 32}
SETTINGS = """
[source]
use = "resilin.data.packed:Shards"
path = "tokens"
[model]
hidden_size = 16
layers = 2
heads = 2
max_positions = 32
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(inner.to_str())


def decoder(seed: int) -> Decoder:
    return Decoder(DecoderSettings(vocab_size=260, **SIZES), seed=seed)


def same(a: Decoder, b: Decoder) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    folder = tmp_path / "runs" / "small"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "settings.toml").write_text(SETTINGS)
    tokenizer.save(folder / "tokenizer")
    store = CheckpointFolder(folder / "checkpoints", keep_last=3)
    for step in (10, 20):
        store.save(step, {"model": dict(decoder(step).state_dict()), "optimizer": {"lr": 1.0}, "run": {"step": step}})
    store.close()
    return folder


def test_a_runs_newest_or_chosen_checkpoint_is_opened_with_its_tokenizer(run: Path, tokenizer: Tokenizer) -> None:
    newest, chosen = open_model(run), open_model(run, step=10)
    assert same(newest.model, decoder(20))
    assert same(chosen.model, decoder(10))
    assert (newest.step, chosen.step) == (20, 10)
    assert newest.needed_tokenizer().digest == tokenizer.digest
    assert newest.end_ids == {256}
    assert newest.description == f"{run}, step 20"
    assert not newest.model.training


def test_a_checkpoints_own_folder_is_opened_with_the_settings_of_its_run(run: Path) -> None:
    opened = open_model(run / "checkpoints" / "step-00000010")
    assert same(opened.model, decoder(10))
    assert opened.step == 10
    with pytest.raises(OpenModelError, match="is step 10, yet --step asks for 20"):
        open_model(run / "checkpoints" / "step-00000010", step=20)


def test_a_hugging_face_folder_is_opened_with_all_its_end_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_pretrained(decoder(5), tmp_path / "hf")
    tokenizer.save(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    opened = open_model(tmp_path / "hf")
    assert same(opened.model, decoder(5))
    assert opened.end_ids == {7, 9, 256}
    assert opened.run is None


def test_a_model_is_opened_in_the_dtype_asked_for(run: Path) -> None:
    assert open_model(run, dtype=torch.bfloat16).model.embed.weight.dtype == torch.bfloat16


def test_a_path_that_is_not_there_suggests_the_nearest(run: Path) -> None:
    with pytest.raises(OpenModelError, match=r"no such file or folder\n.*did you mean .*small\?"):
        open_model(run.parent / "smal")


def test_a_folder_that_is_no_model_tells_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(OpenModelError) as error:
        open_model(tmp_path)
    for expected in ("notes.txt", "settings.toml", "step-", "config.json", ".gguf"):
        assert expected in str(error.value)
    with pytest.raises(OpenModelError, match=r"of single files only \.gguf"):
        open_model(tmp_path / "notes.txt")


def test_a_step_that_is_not_there_names_those_that_are(run: Path) -> None:
    with pytest.raises(OpenModelError, match=r"no checkpoint of step 15; .* 10, 20"):
        open_model(run, step=15)


def test_a_run_without_checkpoints_is_told(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(SETTINGS)
    with pytest.raises(OpenModelError, match="no checkpoint yet"):
        open_model(tmp_path)


def test_a_damaged_checkpoint_is_an_error_for_the_user(run: Path) -> None:
    file = run / "checkpoints" / "step-00000020" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError):
        open_model(run)


def test_a_checkpoint_of_another_model_is_told(run: Path) -> None:
    (run / "settings.toml").write_text(SETTINGS.replace("layers = 2", "layers = 3"))
    with pytest.raises(OpenModelError, match="does not fit the model"):
        open_model(run)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_pretrained(Decoder(DecoderSettings(vocab_size=100, **SIZES)), tmp_path / "hf")
    assert open_model(tmp_path / "hf").tokenizer is None
    tokenizer.save(tmp_path / "words")
    with pytest.raises(OpenModelError, match="257 tokens, the model knows only 100"):
        open_model(tmp_path / "hf", tokenizer=tmp_path / "words")


def test_a_model_without_tokenizer_says_so_when_one_is_needed(tmp_path: Path) -> None:
    save_pretrained(decoder(1), tmp_path / "hf")
    with pytest.raises(OpenModelError, match=r"no tokenizer\.json; name one with --tokenizer"):
        open_model(tmp_path / "hf").needed_tokenizer()
