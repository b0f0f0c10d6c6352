"""A teacher's most likely tokens for each row of data, on disk or in memory: each row is computed once.

One safetensors file a row, named by a hash of the teacher, the temperature, K and the row. A row is written before it
is used, so that a run that goes on finds what the run before it used, to the bit.

Shapes: B rows, T positions, K tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from resilin.config import UserError
from resilin.nouns import Batch
from resilin.objective.distillation import TopLogprobs

_INPUTS = ("tokens", "positions", "documents")


class TeacherCacheError(UserError):
    """A cache that cannot be read; the text names the file."""


class TeacherCache:
    """Rows found by their content.

    Args:
        folder: of the files; None: memory.
        teacher: digest of its weights.
        k: tokens kept a position.
        temperature: of the log-probabilities.
    """

    def __init__(self, folder: Path | None, teacher: str, k: int, temperature: float) -> None:
        self.folder, self.k = folder, k
        self.about = f"{teacher}:{k}:{temperature!r}"
        self.memory: dict[str, tuple[Tensor, Tensor]] = {}

    def name(self, batch: Batch, row: int) -> str:
        """The name of a row."""
        digest = hashlib.blake2b(self.about.encode(), digest_size=16)
        for field in _INPUTS:
            values = batch.get(field)
            if values is not None:
                digest.update(field.encode() + values[row].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def rows(self, batch: Batch, compute: Callable[[Tensor], TopLogprobs]) -> TopLogprobs:
        """Index and log-probabilities of every position, (B * T, K).

        Args:
            batch: its inputs name the rows.
            compute: gives those of the rows (int64) that are not known, one row after the other.

        Raises:
            TeacherCacheError: a file is broken.
        """
        device = batch["tokens"].device
        names = [self.name(batch, row) for row in range(len(batch))]
        found = {name: self._read(name) for name in dict.fromkeys(names)}
        missing = [names.index(name) for name, value in found.items() if value is None]
        if missing:
            computed = compute(torch.tensor(missing, device=device))
            shape = (len(missing), -1, self.k)
            index, logprobs = (x.cpu().reshape(shape) for x in computed)
            for place, row in enumerate(missing):
                found[names[row]] = (index[place].clone(), logprobs[place].clone())
                self._write(names[row], index[place].clone(), logprobs[place].clone())
        rows = [value for name in names if (value := found[name]) is not None]
        index, logprobs = (torch.cat([row[i] for row in rows]).to(device) for i in (0, 1))
        return TopLogprobs(index, logprobs)

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, name: str) -> tuple[Tensor, Tensor] | None:
        if self.folder is None:
            return self.memory.get(name)
        file = self._file(name)
        try:
            tensors = load_file(file)
            return tensors["index"], tensors["logprobs"]
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, OSError) as error:
            raise TeacherCacheError(f"{file}: not a row of a teacher ({error}): remove the file") from None

    def _write(self, name: str, index: Tensor, logprobs: Tensor) -> None:
        if self.folder is None:
            self.memory[name] = (index, logprobs)
            return
        file = self._file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{name}.{os.getpid()}")
        save_file({"index": index, "logprobs": logprobs}, temporary)
        temporary.replace(file)
