"""The files that go with a model: config.json, the tokenizer, a chat template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.foreign.buffers import Gathered
from resilin.checkpoint.foreign.stored import FILES, Stored
from resilin.layout import Place, file, merge

SUFFIXES = (".json", ".jsonl", ".txt", ".model", ".jinja", ".md", ".tiktoken")


def file_tensor(data: bytes) -> Tensor:
    """A file's bytes as a tensor."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def with_file(stored: Stored, name: str, data: bytes) -> Stored:
    """The same checkpoint with one file more, or another content of it."""
    gathered = Gathered()
    where = f"given {name}"
    gathered.whole(FILES + name, where, name, file_tensor(data))
    given = gathered.builder.layout(where)
    own = stored.layout.select([other for other in stored.layout.tensors if other != FILES + name])

    def read(place: Place, buffer: str) -> Tensor:
        return gathered.read(place, buffer) if place == file(where) else stored.read(place, buffer)

    return replace(stored, layout=merge(own, given), read=read)


def with_files(stored: Stored, folder: Path) -> Stored:
    """The same checkpoint with the files of a model's folder: its config.json, tokenizer and the like, no weights.

    Raises:
        CheckpointError: the folder has none.
    """
    found = [path for path in sorted(folder.glob("*")) if path.is_file() and path.suffix in SUFFIXES]
    found = [path for path in found if not path.name.endswith(".index.json")]
    if not found:
        raise CheckpointError(f"{folder}: has no config.json, tokenizer or other file that goes with a model")
    for path in found:
        stored = with_file(stored, path.name, path.read_bytes())
    return stored
