"""Weights in another precision."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from resilin.checkpoint.foreign.beside import with_file
from resilin.checkpoint.foreign.stored import FILES, MODEL, Stored
from resilin.checkpoint.tensor_record import DTYPE_NAMES, DTYPES
from resilin.checkpoint.tensor_write import host_bytes
from resilin.layout import Holdings


@dataclass(frozen=True, eq=False)
class _Cast(Stored):
    """A checkpoint whose weights are given in another dtype; everything else is as it was."""

    dtype: torch.dtype = field(default=torch.float32)

    def _is_cast(self, name: str) -> bool:
        return name.startswith(MODEL) and DTYPES[super().holdings(name).dtype].is_floating_point

    def holdings(self, name: str) -> Holdings:
        held = super().holdings(name)
        return replace(held, dtype=DTYPE_NAMES[self.dtype]) if self._is_cast(name) else held

    def tensor(self, name: str) -> Tensor:
        tensor = super().tensor(name)
        return tensor.to(self.dtype) if self._is_cast(name) else tensor


def with_dtype(stored: Stored, dtype: torch.dtype) -> Stored:
    """The same checkpoint with its floating-point weights rounded to a dtype, and config.json saying so."""
    stored = _told(stored, dtype)
    fields = {name: getattr(stored, name) for name in Stored.__dataclass_fields__}
    return _Cast(**fields, dtype=dtype)


def _told(stored: Stored, dtype: torch.dtype) -> Stored:
    name = FILES + "config.json"
    if name not in stored.names:
        return stored
    config = json.loads(bytes(host_bytes(stored.tensor(name))))
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    told = {**config, **dict.fromkeys(keys, str(dtype).removeprefix("torch."))}
    return with_file(stored, "config.json", json.dumps(told, indent=2).encode())
