"""Encoding word by word gives exactly the ids that the tokenizer itself gives."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resilin.data import encode
from resilin.data.encode import DocumentEncoder, word_cuts
from resilin.data.tokenizer import Tokenizer
from resilin.data.train_tokenizer import SPECIAL, character_tokenizer, train_bpe

WORDS = [
    "the",
    "The",
    "don't",
    "I'll",
    "12345",
    "x=1;",
    "...",
    "naïve",
    "日本語",
    "e\u0301",
    "a.b",
    "(",
    "'s",
    "\u0e01\u0e33",
]
SPACES = [
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n ",
    "\t",
    "\r\n",
    "\r",
    "\u00a0",
    "\u2028",
    "\x1c",
    "\x0b",
    "\x85",
    "\u3000",
    "   \n\n  ",
]
CORPUS = [a + s + b for a in WORDS for s in SPACES for b in WORDS]
BASE = train_bpe(CORPUS, 700)


def changed(pre_tokenizer: dict[str, Any] | None, **parts: Any) -> Tokenizer:
    tree = {**json.loads(BASE.json), **parts}
    if pre_tokenizer is not None:
        tree["pre_tokenizer"] = pre_tokenizer
    return Tokenizer(json.dumps(tree), BASE.config)


def split(regex: str) -> dict[str, Any]:
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    parts = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}, bytes_only]
    return {"type": "Sequence", "pretokenizers": parts}


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TOKENIZERS = {
    "GPT-2": BASE,
    "GPT-2 as a split": changed(split(encode._GPT2)),
    "SmolLM": changed({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, LEVEL]}),
    "Llama 3": changed(split(encode._LINE_ENDS_JOIN[0])),
    "Qwen 2": changed(split(encode._LINE_ENDS_JOIN[1]), normalizer={"type": "NFC"}),
    "prefix space": changed({**LEVEL, "add_prefix_space": True}),
    "characters": character_tokenizer(CORPUS),
}
TEXT = st.lists(st.one_of(st.sampled_from(WORDS), st.sampled_from(SPACES), st.text(max_size=3)), max_size=30).map(
    "".join
)


def ids(encoder: DocumentEncoder, text: str) -> list[int]:
    return np.frombuffer(encoder.encode(text), "<u2").tolist()


def encodable(text: str) -> bool:
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=TEXT.filter(encodable))
@example(text=".\n\n x")
@example(text="a.\r b\n\nc")
@example(text="\n \n\tword  \n")
@example(text="a<|endoftext|> b <|im_start|>")
def test_any_text_gets_the_tokenizers_own_ids(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    for parse_special in (False, True):
        encoder = DocumentEncoder(tokenizer, "uint16", parse_special=parse_special)
        assert ids(encoder, text) == tokenizer.encode(text, parse_special=parse_special)


def test_which_tokenizers_can_be_cut() -> None:
    cuts = {name: word_cuts(tokenizer) for name, tokenizer in TOKENIZERS.items()}
    assert cuts["GPT-2"] == cuts["GPT-2 as a split"] == "GPT-2 words"
    assert cuts["SmolLM"] == "before spaces"
    assert cuts["Llama 3"] == cuts["Qwen 2"] == "before spaces, after lines"
    assert cuts["prefix space"] is cuts["characters"] is None


@pytest.mark.parametrize("flag", [{"lstrip": True}, {"content": "two words"}])
def test_added_tokens_that_touch_whitespace_forbid_cutting(flag: dict[str, Any]) -> None:
    tree = json.loads(BASE.json)
    tree["added_tokens"][-1] |= flag
    tree["model"]["vocab"][tree["added_tokens"][-1]["content"]] = tree["added_tokens"][-1]["id"]
    if "content" in flag:
        del tree["model"]["vocab"][SPECIAL[-1]]
    assert word_cuts(Tokenizer(json.dumps(tree))) is None


@pytest.mark.parametrize("name", ["GPT-2", "SmolLM", "Llama 3"])
def test_a_text_longer_than_a_slice_gets_the_same_ids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_SLICE", 37)
    monkeypatch.setattr(encode, "_MOST_WORDS", 20)
    text = "".join(np.random.default_rng(0).choice(WORDS + SPACES, 600).tolist())
    tokenizer = TOKENIZERS[name]
    assert ids(DocumentEncoder(tokenizer, "uint16"), text) == tokenizer.encode(text, parse_special=False)


def test_a_large_vocabulary_is_stored_wide() -> None:
    encoder = DocumentEncoder(BASE, "uint32")
    assert np.frombuffer(encoder.encode("the dog"), "<u4").tolist() == BASE.encode("the dog")
