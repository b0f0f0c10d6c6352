"""The highest tier: matrices of experts on the device, while a layer computes.

Shapes: A experts that are used, D hidden size, F expert size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from resilin.memory.expert_state import ExpertShape
from resilin.models.moe import Matrices

Fill = Callable[[int, int, dict[str, Tensor]], None]
"""`fill(layer, expert, matrices)`: puts the weights of an expert into its matrices, by `ExpertShape.names`."""
AddGradients = Callable[[int, tuple[int, ...], tuple[Tensor | None, ...]], None]


class ExpertLoans:
    """Matrices of the experts that some layers use, which come when they are asked for.

    Args:
        shape: of an expert.
        device: where they go.
        most: layers whose experts may be there at once.
        fill: brings them.
        add_gradients: takes what a backward pass found for those of a layer, (A, ...) each.

    Attributes:
        peak: the most bytes that matrices and gradients took.
    """

    def __init__(
        self, shape: ExpertShape, device: torch.device, most: int, fill: Fill, add_gradients: AddGradients
    ) -> None:
        self.shape, self.device, self.peak = shape, device, 0
        self._most, self._fill, self._add = most, fill, add_gradients
        self._held: OrderedDict[tuple[int, tuple[int, ...], torch.dtype], dict[str, Tensor]] = OrderedDict()
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    @property
    def bytes(self) -> int:
        """Of the matrices that are there."""
        return sum(matrix.nbytes for matrices in self._held.values() for matrix in matrices.values())

    def clear(self) -> None:
        """Let all go: they have changed."""
        self._held.clear()

    @contextmanager
    def lend(
        self, layer: int, experts: Sequence[int], *, trained: bool, come: Callable[[], None], again: Callable[[], None]
    ) -> Iterator[Matrices]:
        """The matrices of some experts of a layer, for its forward pass; the backward pass brings them again.

        They have the format that products are computed in: what a parameter would be cast to, they are on arrival.

        Args:
            layer: its number.
            experts: which.
            trained: whether their gradients are wanted.
            come: called when they are there.
            again: called when the backward pass has brought them again.
        """
        kind = self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        held = self._fetch(layer, tuple(experts), dtype)
        come()
        matrices = list(held.values())
        if trained:
            matrices = list(_Lent.apply(self._anchor, self, layer, tuple(experts), *matrices))
        places = {matrix.untyped_storage().data_ptr(): name for name, matrix in zip(held, matrices, strict=True)}

        def pack(tensor: Tensor) -> Any:
            name = places.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
            if name is None:
                return tensor
            return name, tensor.shape, tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            name, shape, stride, offset = packed
            brought = self._fetch(layer, tuple(experts), dtype)[name]
            again()
            return brought.as_strided(shape, stride, offset)

        by_name = dict(zip(self.shape.names, matrices, strict=True))
        with saved_tensors_hooks(pack, unpack):
            yield by_name.get("gate"), by_name["up"], by_name["down"]

    def take_gradients(self, layer: int, experts: tuple[int, ...], grads: tuple[Tensor | None, ...]) -> None:
        """What a backward pass found."""
        self.peak = max(self.peak, self.bytes + sum(grad.nbytes for grad in grads if grad is not None))
        self._add(layer, experts, grads)

    def _fetch(self, layer: int, experts: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        """(A, ...) each, by name."""
        key = layer, experts, dtype
        known = self._held.get(key)
        if known is not None:
            self._held.move_to_end(key)
            return known
        while len(self._held) >= self._most:
            self._held.popitem(last=False)
        made = {
            name: torch.empty((len(experts), *self.shape.matrix_shape(name)), device=self.device, dtype=dtype)
            for name in self.shape.names
        }
        for row, expert in enumerate(experts):
            self._fill(layer, expert, {name: stack[row] for name, stack in made.items()})
        self._held[key] = made
        self.peak = max(self.peak, self.bytes)
        return made


class _Lent(torch.autograd.Function):
    """Matrices that nobody but the graph's hooks keeps, and whose gradients go elsewhere."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loans: ExpertLoans, layer: int, experts: Any, *matrices: Tensor) -> Any:
        ctx.loans, ctx.layer, ctx.experts = loans, layer, experts
        return tuple(matrix.view_as(matrix) for matrix in matrices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        ctx.loans.take_gradients(ctx.layer, ctx.experts, grads)
        return (None,) * (4 + len(grads))
