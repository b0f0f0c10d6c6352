"""A text as the tokens a model expects at the beginning of a document."""

from __future__ import annotations

from resilin.data.tokenizer import Tokenizer
from resilin.inference.generate import PromptError


def begin_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text: its begin token (Llama), or nothing."""
    if tokenizer.config.get("add_bos_token") is True and tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    added = list(tokenizer.inner.encode("", add_special_tokens=True).ids)
    return added if added and added == [tokenizer.bos_id] else []


def prompt_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a prompt as `transformers` would make them; an empty prompt begins a new document.

    Raises:
        PromptError: the text is empty and the tokenizer has neither a begin nor an end token.
    """
    tokens = [*begin_tokens(tokenizer), *tokenizer.encode(text)]
    if tokens:
        return tokens
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if start is None:
        raise PromptError("the prompt is empty, and the tokenizer has no token to begin a document: give some text")
    return [start]
