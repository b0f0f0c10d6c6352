"""Encoding much text quickly: each distinct word is encoded once.

Byte-level tokenizers first cut a text into words and encode each word on its own. Where a text can be cut without
changing that (always between a word and the space before the next), the ids of a piece are remembered and a text
becomes one look-up for each piece: the same ids as the tokenizer's own, several times faster. A tokenizer whose cuts
are not known encodes whole documents in the ordinary way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from resilin.data.shards import numpy_dtype
from resilin.data.tokenizer import Tokenizer

_SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # what the tokenizers' \s matches
_CUT = re.compile(f"(?<![{_SPACES}]) ")
_MOST_WORDS = 400_000
_SLICE = 1 << 20  # characters looked at together: bounds the memory of a long document

# The word patterns of published tokenizers in which no match crosses from a word into the whitespace after it
# (GPT-2's), or crosses only into line ends (those of Llama 3 and Qwen 2, where "." takes the line ends behind it).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LINE_ENDS_JOIN = tuple(
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers in (r"\p{N}{1,3}", r"\p{N}")
)
# In ASCII text GPT-2's own pattern can be used as it is: shorter pieces, so fewer distinct ones.
_GPT2_ASCII = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
_BEFORE_SPACES, _AFTER_LINES, _GPT2_WORDS = "before spaces", "before spaces, after lines", "GPT-2 words"


def _pattern(joins_line_ends: bool, spaces: str) -> re.Pattern[str]:
    s, not_s = f"[{spaces}]", f"[^{spaces}]"
    if not joins_line_ends:
        # A line end alone between two words is a word of its own; otherwise whitespace goes with what follows it.
        return re.compile(f"\n(?={not_s})|{s}*{not_s}+|{s}+")
    # Whitespace up to its last line end goes with the word before it if it begins with a line end.
    blank = f"[{spaces.replace(chr(9) + '-' + chr(13), chr(9) + chr(11) + '-' + chr(13))}]"  # without the line feed
    return re.compile(f"{blank}*{not_s}+(?:(?=[\r\n]){s}*\n)?|{s}*\n|{s}+")


def word_cuts(tokenizer: Tokenizer) -> str | None:
    """How a tokenizer lets texts be cut, from the coarsest to the finest rule; None where it is not known."""
    parsed: dict[str, Any] = json.loads(tokenizer.json)
    normalizer = parsed.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        return None
    for token in parsed.get("added_tokens", []):
        # Such tokens take in the whitespace around them, or look at what stands beside them.
        if token["lstrip"] or token["rstrip"] or token["single_word"] or re.search(r"\s", token["content"]):
            return None
    top = parsed.get("pre_tokenizer") or {}
    steps = top.get("pretokenizers", []) if top.get("type") == "Sequence" else [top]
    cuts, plain = None, True
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space", True):
            if step.get("use_regex", True):
                cuts = _BEFORE_SPACES
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            regex = step["pattern"].get("Regex")
            if regex == _GPT2:
                cuts = _BEFORE_SPACES
            elif regex in _LINE_ENDS_JOIN:
                cuts = _AFTER_LINES
            else:
                return None
        elif kind == "Digits":  # digits are set apart one by one or in runs, never together with whitespace
            plain = False
        else:
            return None
    return _GPT2_WORDS if cuts == _BEFORE_SPACES and plain else cuts


class DocumentEncoder:
    """Texts to stored token ids.

    Args:
        tokenizer: gives the ids.
        dtype: "uint16" or "uint32", in which ids are stored.
        parse_special: whether the text of a special token becomes that token.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: str, *, parse_special: bool = False) -> None:
        self._inner = tokenizer.inner if parse_special else tokenizer.plain
        self._dtype = numpy_dtype(dtype)
        self.cuts = word_cuts(tokenizer)
        self._joins_line_ends = joins = self.cuts == _AFTER_LINES
        self._any = _pattern(joins, _SPACES)
        # Words as fine as GPT-2's would take apart a token that was added to the vocabulary as a whole.
        added = self._inner.get_added_tokens_decoder().values()
        whole = any(parse_special or not token.special for token in added)
        fine = self.cuts == _GPT2_WORDS and not whole
        self._ascii = _GPT2_ASCII if fine else _pattern(joins, "\t-\r ")
        self._known: dict[str, bytes] = {}

    def encode(self, text: str) -> bytes:
        """The ids of a text, as little-endian bytes of the stored type."""
        if self.cuts is None or (self._joins_line_ends and "\r" in text and re.search("\r(?!\n)", text)):
            return self._plain([text])[0]
        pattern = self._ascii if text.isascii() else self._any
        if len(text) <= _SLICE:
            return self._words(pattern.findall(text))
        parts, start = [], 0
        while start < len(text):
            end = start + _SLICE
            # A cut that holds for every pattern: a space after something that is no whitespace.
            cut = _CUT.search(text, end)
            stop = cut.start() if cut else len(text)
            parts.append(self._words(pattern.findall(text, start, stop)))
            start = stop
        return b"".join(parts)

    def _words(self, words: list[str]) -> bytes:
        known = self._known
        new = list(set(words).difference(known))
        if new:
            if len(known) > _MOST_WORDS:
                known.clear()
                new = list(set(words))
            known.update(zip(new, self._plain(new), strict=True))
        return b"".join(map(known.__getitem__, words))

    def _plain(self, texts: Sequence[str]) -> list[bytes]:
        ids = [item.ids for item in self._inner.encode_batch_fast(texts, add_special_tokens=False)]
        flat = np.fromiter(chain.from_iterable(ids), dtype=self._dtype).tobytes()
        width, parts, at = self._dtype.itemsize, [], 0
        for item in ids:
            end = at + len(item) * width
            parts.append(flat[at:end])
            at = end
        return parts
