"""The tokenizer that is stored with a model: in its folder, or inside its GGUF file."""

from __future__ import annotations

from pathlib import Path

from resilin.data.tokenizer import Tokenizer


def gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer inside a GGUF file, with its special tokens and chat template."""
    from resilin.models.gguf_tokenizer import load_gguf_tokenizer

    stored = load_gguf_tokenizer(path)
    names = {"bos_token": stored.bos_id, "eos_token": stored.eos_id, "pad_token": stored.pad_id}
    config: dict[str, object] = {
        key: stored.tokenizer.id_to_token(index) for key, index in names.items() if index is not None
    }
    if stored.chat_template is not None:
        config["chat_template"] = stored.chat_template
    return Tokenizer(stored.tokenizer.to_str(), {**config, "add_bos_token": stored.add_bos})


def stored_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a .gguf file.

    Raises:
        DataError: there is none.
    """
    return gguf_tokenizer(path) if path.suffix == ".gguf" else Tokenizer.load(path)
