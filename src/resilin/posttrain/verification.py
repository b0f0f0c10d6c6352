"""Rows that travel with their batch, so that answers to its prompts can be checked anywhere.

Shapes: B prompts, L bytes of the longest row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_NEEDED = ("messages", "prompt", "ground_truth", "dataset", "data_source", "reward_model")


def pack_rows(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """(B, L) uint8: what verifiers need of each row as JSON, filled up with zeros."""
    raw = [json.dumps({key: row[key] for key in _NEEDED if key in row}).encode() for row in rows]
    packed_BL = torch.zeros(len(raw), max(map(len, raw), default=0), dtype=torch.uint8)
    for number, text in enumerate(raw):
        packed_BL[number, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return packed_BL


def unpack_rows(packed_BL: Tensor) -> list[dict[str, Any]]:
    """The rows of a batch."""
    return [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in packed_BL.cpu()]
