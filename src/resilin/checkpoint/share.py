"""What one process contributes to a checkpoint: the pieces of tensors that it writes, and its tree of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resilin.checkpoint.errors import CheckpointError
from resilin.checkpoint.tensor_record import DTYPE_NAMES
from resilin.checkpoint.tree import Json, TakenApart
from resilin.layout import Region
from resilin.nouns import Deferred


@dataclass(frozen=True)
class Piece:
    """A region of a tensor to be written.

    Attributes:
        tensor: its name in the tree.
        dtype: of the elements.
        shape: of the whole tensor.
        region: which elements.
        read: gives them, with the region's sizes; asked once, just before they are written.
    """

    tensor: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    region: Region
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Of its data."""
        return self.region.numel * self.dtype.itemsize

    @property
    def whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.region.sizes == self.shape


@dataclass(frozen=True)
class Share:
    """One process's part of a save.

    Attributes:
        tree: its tree as JSON, with marks for tensors.
        pieces: what it writes.
        scalars: the 0-d tensors it has, which must be equal on all that have them.
        unlisted: those of them that no layout gives a writer.
        digest: of the layout, which must be the same for all; empty where one process has everything.
        ready: returns when the pieces may be read; called once, by the thread that writes, before it does.
    """

    tree: Json
    pieces: tuple[Piece, ...]
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    unlisted: frozenset[str] = frozenset()
    digest: str = ""
    ready: Callable[[], None] = lambda: None

    @property
    def bytes(self) -> int:
        """That it writes."""
        return sum(piece.bytes for piece in self.pieces)


def check_tensor(where: str, tensor: Tensor | Deferred) -> None:
    """Refuse a tensor whose elements safetensors cannot hold, before anything is written.

    Raises:
        CheckpointError: naming the tensor and what to do.
    """
    reason = None
    if isinstance(tensor, Tensor):
        if tensor.is_meta:
            reason = "it is on the meta device and has no values; initialise the model first"
        elif tensor.layout != torch.strided or tensor.is_quantized:
            reason = (
                f"its layout is {tensor.layout} (quantized: {tensor.is_quantized}); save its parts as plain tensors"
            )
        elif type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            reason = f"it is a {type(tensor).__module__}.{type(tensor).__name__}; save the plain tensors it is made of"
    scalar_f4 = tensor.dtype == torch.float4_e2m1fn_x2 and len(tensor.shape) == 0
    if reason is None and (tensor.dtype not in DTYPE_NAMES or scalar_f4):
        reason = f"safetensors cannot hold {tensor.dtype} of this shape; save a view of it, such as view(torch.uint8)"
    if reason:
        raise CheckpointError(f"tensor {where!r} cannot be saved: {reason}")


def whole_share(apart: TakenApart) -> Share:
    """The share of a process that has everything: each tensor is one piece.

    Raises:
        CheckpointError: for what cannot be saved, naming its place.
    """
    return Share(apart.json, tuple(_whole(name, tensor) for name, tensor in apart.tensors.items()))


def _whole(name: str, tensor: Tensor | Deferred) -> Piece:
    check_tensor(name, tensor)
    shape = tuple(tensor.shape)
    read = tensor.read if isinstance(tensor, Deferred) else lambda: tensor
    return Piece(name, tensor.dtype, shape, Region.whole(shape), read)


def part_of(name: str) -> str:
    """The (escaped) top-level key that a tensor's name begins with."""
    return name.partition("/")[0]
