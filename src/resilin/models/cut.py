"""Running a part of a model in place: which regions of its parameters are computed with, and for whom.

A **cut** says of each parameter which boxes of it are used. Modules compute with views of those boxes: nothing is
copied, and what is outside is not computed. Who chooses cuts (and why) is not known here: see `resilin.nested`.

The cut in force belongs to the thread (or task) that entered it and is handed to each block as an argument, so that a
block that is computed again in the backward pass is cut as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor, nn

from resilin.config import UserError
from resilin.layout import Region
from resilin.models import uncompiled
from resilin.models.chain_linear import ChainLinear
from resilin.models.linear import Linear, product

Regions = Mapping[str, tuple[Region, ...]]
"""By name of the parameter, the boxes of it that are used, side by side in one dimension; names that are missing are
used whole."""


class CutError(UserError, ValueError):
    """A module of which no part can be computed; the text names it."""


def view_of(tensor: Tensor, box: Region) -> Tensor:
    """The box as a view; the tensor itself where the box is all of it.

    A parameter that is a part of the whole one says as `box_in_whole` which box it is; the view is then what of `box`
    is here, which may be nothing.
    """
    where: Region | None = getattr(tensor, "box_in_whole", None)
    if where is not None:
        box = (box & where).inside(where)
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, offset if size else 0, size)  # nothing may lie beyond what is here
    return tensor


@dataclass(frozen=True, eq=False)
class BlockCut:
    """How much of a decoder's block is computed.

    Attributes:
        regions: of its parameters, by their names within the block.
        hidden: leading values of the residual stream.
        heads: query heads, equally many to each key head.
        key_heads: leading key heads.
        experts: numbers of the experts that may be chosen; None: all, or the block has none.
        in_attention: whether anything of the attention is cut.
        experts_per_token: how many a token visits; 0: as always.
    """

    regions: Regions
    hidden: int
    heads: int
    key_heads: int
    experts: tuple[int, ...] | None = None
    experts_per_token: int = 0
    in_attention: bool = True

    def linear(self, x: Tensor, map_: nn.Linear | ChainLinear, name: str) -> Tensor:
        """What the used part of a linear map gives, (..., I) -> (..., O).

        Boxes that lie below each other give their outputs side by side; boxes beside each other read their share of
        the input each.

        Args:
            x: as wide as the boxes together, or as one of them where they lie below each other.
            map_: whole.
            name: of the map within the block.
        """
        boxes = self.regions.get(f"{name}.weight")
        if boxes is None:
            whole: Tensor = map_(x)
            return whole
        if not (isinstance(map_, Linear) and map_.can_be_cut):
            raise CutError(
                f"{name} is a {type(map_).__name__}, of which no part can be computed: make the model plain first "
                "(merge its adapters, apply its masks), or choose a budget that leaves it whole"
            )
        biases = (None,) * len(boxes) if map_.bias is None else self._biases(map_, name, boxes)
        weights = [view_of(map_.weight, box) for box in boxes]  # where the map is a part, what is here of each box
        if len(boxes) == 1:
            return product(x, weights[0], biases[0])
        if boxes[0].offsets[0] != boxes[1].offsets[0]:
            rows = [product(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            return torch.cat(rows, -1)
        shares = x.split([weight.shape[1] for weight in weights], -1)
        total = product(shares[0], weights[0], biases[0])
        for share, weight in zip(shares[1:], weights[1:], strict=True):
            total = total + product(share, weight)
        return total

    def gathered(self, x: Tensor, map_: nn.Linear, name: str) -> Tensor:
        """As `linear`, for boxes below each other, which are copied together first: the bits of a map of these rows."""
        boxes = self.regions.get(f"{name}.weight", ())
        if len(boxes) < 2 or type(map_) is not Linear:
            return self.linear(x, map_, name)
        weight_OI = torch.cat([view_of(map_.weight, box) for box in boxes])
        return product(x, weight_OI, None if map_.bias is None else self.vector(map_.bias, f"{name}.bias"))

    def _biases(self, map_: Linear, name: str, boxes: tuple[Region, ...]) -> tuple[Tensor | None, ...]:
        assert map_.bias is not None
        of_bias = self.regions.get(f"{name}.bias")
        parts = (map_.bias,) if of_bias is None else tuple(view_of(map_.bias, box) for box in of_bias)
        added = tuple(map(map_.added, parts))
        return added if len(added) == len(boxes) else added * len(boxes)

    def vector(self, vector: Tensor, name: str) -> Tensor:
        """The used part of a vector: a view where it is one run, else the runs put together."""
        boxes = self.regions.get(name)
        if boxes is None:
            return vector
        parts = [view_of(vector, box) for box in boxes]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def norm(self, x: Tensor, norm: nn.Module, name: str, used: int = 0) -> Tensor:
        """A norm of the used part of its width, whose weight has this name in the block.

        Args:
            x: as wide as that part; where ranks divide the width, as what of it is here.
            norm: over the whole width.
            name: of its weight.
            used: values that all ranks together use, for a norm whose width they divide (`divided`).
        """
        told = {"used": used} if used and getattr(norm, "divided", False) else {}
        weight = self.vector(norm.weight, name) if name in self.regions else None  # type: ignore[arg-type]
        part: Tensor = norm(x, **told) if weight is None else norm(x, weight, **told)
        return part

    def masked(self, x: Tensor, name: str) -> Tensor:
        """An activation of this name as far as it is there; of a cut block all of it is."""
        return x

    def share(self, name: str) -> Tensor | None:
        """Which share of a norm's width is there, for each of its groups; None: all of what is computed."""
        return None

    def stack(self, stack: Tensor | None, name: str) -> Tensor | None:
        """The used part of stacked matrices whose first dimension is whole."""
        boxes = self.regions.get(name)
        return stack if stack is None or boxes is None else view_of(stack, boxes[0])


@dataclass(frozen=True, eq=False)
class Cut:
    """How much of a decoder is computed.

    Attributes:
        hidden: leading values of the residual stream.
        blocks: of each block; None: all of it.
        skipped: blocks that are not computed: the stream passes them by.
        trajectory: of a looped decoder, the steps of the loops that are run; (): its own.
    """

    hidden: int
    blocks: tuple[BlockCut | None, ...]
    skipped: frozenset[int] = field(default_factory=frozenset)
    trajectory: tuple[int, ...] = ()

    def embedded(self, x_BTD: Tensor) -> Tensor:
        """The stream before the first block."""
        return x_BTD

    def passed(self, layer: int, before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
        """The stream after a block that was computed."""
        return after_BTD

    def last_norm(self, x_BTD: Tensor, norm: nn.Module) -> Tensor | None:
        """The stream after the last norm; None: as the decoder norms it."""
        return None


_cuts: ContextVar[tuple[tuple[nn.Module, Cut | None], ...]] = ContextVar("cuts", default=())
_count, _counting = 0, Lock()
_any = False  # whether any thread runs a model cut: else nobody looks, and compiled code has no break for it


def _found(model: nn.Module) -> Cut | None:
    return next((cut for one, cut in _cuts.get() if one is model), None)


def cut_of(model: nn.Module) -> Cut | None:
    """The cut that this thread runs a model with; None: all of the model."""
    if not _any:
        return None
    cut: Cut | None = uncompiled.outside(_found, model)
    return cut


@contextmanager
def running(model: nn.Module, cut: Cut | None) -> Iterator[None]:
    """Inside, this thread runs the model cut like this; an inner one takes the place of an outer one.

    Args:
        model: the module that is asked for its cut, a decoder; not a wrapper around it.
        cut: None: all of it.
    """
    _entered(1)
    token = _cuts.set(((model, cut), *_cuts.get()))
    try:
        yield
    finally:
        _cuts.reset(token)
        _entered(-1)


def _entered(more: int) -> None:
    global _count, _any
    with _counting:
        _count += more
        _any = _count > 0
