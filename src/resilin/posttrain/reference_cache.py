"""Log-probabilities of a reference model, kept on disk, so that the model need not stay in memory.

A row is found by its content: a 64-bit hash of its tokens and labels up to the last label. The row of another data
set, of the held-out part, or of a file that changed is simply not found, whatever its number is.

Shapes: R rows, T positions, B rows that are asked for.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from resilin.config.errors import UserError
from resilin.objective.next_token import IGNORE

# Odd constants of splitmix64 and of Knuth's multiplicative hash, as signed 64-bit numbers: products wrap.
_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, 0x2545F4914F6CDD1D)


class ReferenceCacheError(UserError):
    """A cache of reference log-probabilities that cannot be used; the text says why."""


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 64-bit words whose output bits all depend on the input (splitmix64's finaliser)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX[1]
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX[2]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def content_keys(tokens_RT: Tensor, labels_RT: Tensor) -> Tensor:
    """(R,) int64: a hash of each row's tokens and labels up to its last label; padding does not count."""
    valid_RT = labels_RT != IGNORE
    place_T = torch.arange(1, labels_RT.shape[1] + 1, device=labels_RT.device)
    last_R1 = (valid_RT * place_T).amax(1, keepdim=True)
    words_RT = _mixed(_mixed(place_T * _MIX[0] + tokens_RT) + labels_RT * _MIX[3])
    return _mixed((words_RT * (place_T <= last_R1)).sum(1) + last_R1[:, 0])


class ReferenceCache:
    """Summed log-probabilities by content.

    Args:
        path: a safetensors file, read where it is there; None: memory only.
        data: digest of the data set the numbers are of.
        model: what names the reference model.

    Raises:
        ReferenceCacheError: the file is broken, or of other data or another model.
    """

    def __init__(self, path: Path | None = None, data: str = "", model: str = "") -> None:
        self.path, self.about = path, {"data": data, "model": model}
        self.keys_R = torch.empty(0, dtype=torch.int64)
        self.values_R = torch.empty(0, dtype=torch.float64)
        self.rows_R = torch.empty(0, dtype=torch.int64)
        self._unsaved = 0
        if path is not None and path.is_file():
            self._read(path)

    def __len__(self) -> int:
        return len(self.keys_R)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                about = {key: (file.metadata() or {}).get(key, "") for key in self.about}
                keys_R, values_R, rows_R = (file.get_tensor(name) for name in ("keys", "logprobs", "rows"))
        except (SafetensorError, OSError) as error:
            raise ReferenceCacheError(f"{path}: not a cache of reference log-probabilities: {error}") from None
        for what, wanted in self.about.items():
            if about[what] != wanted:
                raise ReferenceCacheError(
                    f"{path}: holds log-probabilities for other {what} ({about[what][:16] or 'unnamed'} instead of "
                    f"{wanted[:16] or 'unnamed'}): name another file, or remove this one"
                )
        self.keys_R, self.values_R, self.rows_R = keys_R, values_R, rows_R

    def find(self, keys_B: Tensor) -> tuple[Tensor, Tensor]:
        """(values_B float64, known_B bool) for content keys, on their device; a value that is not known is 0."""
        if not len(self):
            return torch.zeros(len(keys_B), dtype=torch.float64, device=keys_B.device), torch.zeros_like(keys_B).bool()
        if self.keys_R.device != keys_B.device:
            self.keys_R, self.values_R = self.keys_R.to(keys_B.device), self.values_R.to(keys_B.device)
        place_B = torch.searchsorted(self.keys_R, keys_B).clamp(max=len(self) - 1)
        known_B = self.keys_R[place_B] == keys_B
        return self.values_R[place_B] * known_B, known_B

    def add(self, keys_B: Tensor, values_B: Tensor, rows_B: Tensor) -> None:
        """Remember the values of some rows (`rows_B`: their numbers in the data, for people who read the file)."""
        _, known_B = self.find(keys_B)
        new = (~known_B).nonzero()[:, 0]
        keys_N, first = _first_of_each(keys_B[new])
        new = new[first]
        keys_R = torch.cat([self.keys_R.to(keys_B.device), keys_N])
        order = keys_R.argsort()
        self.keys_R = keys_R[order]
        self.values_R = torch.cat([self.values_R.to(keys_B.device), values_B[new].double()])[order]
        self.rows_R = torch.cat([self.rows_R, rows_B[new].cpu()])[order.cpu()]
        self._unsaved += len(new)

    def save(self) -> None:
        """Write the file, whole or not at all; nothing where there is nothing new."""
        if self.path is None or not self._unsaved:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        tensors = {"keys": self.keys_R.cpu(), "logprobs": self.values_R.cpu(), "rows": self.rows_R}
        save_file(tensors, temporary, metadata=self.about)
        temporary.replace(self.path)
        self._unsaved = 0


def _first_of_each(keys_N: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct keys, ascending, and where each stands first."""
    distinct, inverse = torch.unique(keys_N, return_inverse=True)
    first = torch.full_like(distinct, len(keys_N))
    first.scatter_reduce_(0, inverse, torch.arange(len(keys_N), device=keys_N.device), "amin")
    return distinct, first
