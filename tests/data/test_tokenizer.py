"""Tokenizers: nothing is lost, files open in transformers, streamed text is the whole text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.data.errors import DataError
from resilin.data.tokenizer import Tokenizer
from resilin.data.train_tokenizer import SPECIAL, byte_tokenizer, character_tokenizer, train_bpe

quick = settings(deadline=None, max_examples=50)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
BPE = train_bpe(["the quick brown fox", "quer über den Deich", "  two  spaces\n\n"] * 4, 300)
BYTES = byte_tokenizer()


@quick
@given(text=TEXT)
@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_any_text_comes_back_from_its_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, parse_special=False)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@quick
@given(text=TEXT)
@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_byte_lengths_add_up_to_the_bytes_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, parse_special=False)
    assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode())


def test_special_tokens_stand_for_no_bytes() -> None:
    assert BPE.byte_lengths[: len(SPECIAL)].tolist() == [0] * len(SPECIAL)


@quick
@given(text=TEXT)
def test_a_byte_tokenizer_numbers_bytes_from_four(text: str) -> None:
    assert BYTES.encode(text, parse_special=False) == [byte + 4 for byte in text.encode()]


@quick
@given(text=TEXT)
@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_streamed_pieces_join_to_the_text_and_never_show_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream_decoder()
    pieces = [stream.step(token) for token in tokenizer.encode(text, parse_special=False)]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


def test_an_incomplete_character_is_held_back_until_the_end() -> None:
    stream = BYTES.stream_decoder()
    assert [stream.step(token) for token in BYTES.encode("日")[:2]] == ["", ""]
    assert "\ufffd" in stream.finish()


def test_the_text_of_a_special_token_is_only_a_token_where_asked_for() -> None:
    text = "a<|endoftext|>b"
    assert BPE.eos_id in BPE.encode(text)
    assert BPE.eos_id not in BPE.encode(text, parse_special=False)
    assert BPE.decode(BPE.encode(text, parse_special=False), skip_special=False) == text


def test_a_character_tokenizer_knows_its_characters_and_marks_others() -> None:
    tokenizer = character_tokenizer(["abc \n", "日"])
    assert tokenizer.vocab_size == len(SPECIAL) + 1 + 6
    assert tokenizer.decode(tokenizer.encode("cab\n日")) == "cab\n日"
    assert tokenizer.encode("x") == [len(SPECIAL)]
    assert int(tokenizer.byte_lengths[tokenizer.encode("日")].sum()) == 3


@pytest.mark.parametrize(
    "tokenizer", [BPE, BYTES, character_tokenizer(["abc Thequick"])], ids=["bpe", "bytes", "characters"]
)
def test_transformers_opens_the_folder_and_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The quick  brown\n\n fox's 日本 <|endoftext|> tail "
    assert theirs.encode(text) == tokenizer.encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert len(theirs) == tokenizer.vocab_size


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest == BPE.digest
    assert (loaded.eos_id, loaded.pad_id, loaded.bos_id) == (BPE.eos_id, BPE.pad_id, None)
    loaded.save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_training_is_repeatable() -> None:
    texts = ["one two three", "two three four"] * 5
    assert train_bpe(texts, 280).digest == train_bpe(texts, 280).digest


def test_special_tokens_are_read_from_the_config_in_both_forms(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>", "chat_template": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.bos_id, loaded.chat_template) == (3, 2, "x")
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(tmp_path / "tokenizer.json").chat_template == "from the file"


def test_stored_padding_and_truncation_do_not_lose_tokens() -> None:
    tree = json.loads(BPE.json)
    tree["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert len(Tokenizer(json.dumps(tree)).encode("a long enough text")) > 2


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="below 260"):
        train_bpe(["a"], 100)
