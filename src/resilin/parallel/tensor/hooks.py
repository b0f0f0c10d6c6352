"""What moves activations between ranks at the borders of a model's regions: hooks on modules that know nothing of it.

Between regions the stream is whole on every rank, or cut along its positions (sequence parallelism, Korthikanti et al.,
2022): then norms and dropout work on a part, and the two sums of a block become a gather before and a scattered sum
after each region, which move the same bytes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resilin.keys import Keys
from resilin.models.tensor_plan import TensorPlan
from resilin.parallel.errors import ParallelError
from resilin.parallel.group import Group
from resilin.parallel.tensor.collectives import copy_in, gather, once, put_together, scatter_sum, sum_out


@dataclass(frozen=True)
class Stream:
    """The activations between regions.

    Attributes:
        group: the ranks.
        sequence: whether they are cut along their positions.
        dim: the dimension of positions.
    """

    group: Group
    sequence: bool
    dim: int

    def enter(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before a region: its first argument becomes whole, with partial gradients."""
        x, *others = arguments
        return (gather(x, self.dim, self.group) if self.sequence else copy_in(x, self.group), *others)

    def leave(self, _: nn.Module, __: tuple[Any, ...], results: Any) -> Any:
        """After a region: its first result is summed; others, which all ranks have alike, count once."""
        if isinstance(results, Tensor):
            return self._summed(results)
        first, *others = results
        return (self._summed(first), *(once(x, self.group) if isinstance(x, Tensor) else x for x in others))

    def _summed(self, x: Tensor) -> Tensor:
        return scatter_sum(x, self.dim, self.group) if self.sequence else sum_out(x, self.group)

    def end(self, _: nn.Module, __: tuple[Any, ...], x: Tensor) -> Tensor:
        """After the last module of the stream: every rank has all of it."""
        return put_together(x, self.dim, self.group) if self.sequence else x


@dataclass
class Call:
    """What is done with the arguments and results of the whole model.

    Attributes:
        stream: of the model.
        plan: of the model.
    """

    stream: Stream
    plan: TensorPlan
    _length: int | None = None

    def before(
        self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the model runs.

        Raises:
            ParallelError: for an argument that cannot be used, or positions that cannot be divided.
        """
        size = self.stream.group.size
        for name in self.plan.refused:
            if named.get(name) is not None:
                raise ParallelError(
                    f"{type(module).__name__} is divided among {size} ranks and takes no {name!r}: generate and "
                    "evaluate token by token with the whole model (parallel.tensor = 1)"
                )
        if not self.stream.sequence:
            return arguments, named
        named = {name: value for name, value in named.items() if name not in self.plan.hints}
        length = arguments[0].shape[self.stream.dim]
        self._length = length if length % size else None
        if self._length is not None:
            arguments, named = self._padded(module, arguments, named, -length % size)
            length += -length % size
        keys = named.get("keys")
        if isinstance(keys, Keys):  # each rank draws its own positions' part of the mask
            places_T = torch.arange(length) if keys.places_T is None else keys.places_T
            named["keys"] = keys.at(places_T.chunk(size)[self.stream.group.index])
        return arguments, named

    def _padded(
        self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], more: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        plan, dim, size = self.plan, self.stream.dim, self.stream.group.size
        length = arguments[0].shape[dim]
        if not plan.padding or (plan.divided and getattr(module, plan.divided, None) is not None):
            raise ParallelError(
                f"rows of {length} positions cannot be divided among {size} ranks of tensor parallelism: use a "
                f"multiple of {size}, such as {length // size * size or size}, or turn sequence parallelism off"
            )
        bound = inspect.signature(module.forward).bind(*arguments, **named)
        if plan.positions is not None and bound.arguments.get(plan.positions) is None:
            where = torch.arange(length, device=arguments[0].device)
            bound.arguments[plan.positions] = where.expand(arguments[0].shape)
        for name, value in plan.padding:
            given = bound.arguments.get(name)
            if given is not None:
                bound.arguments[name] = _longer(given, dim, more, value)
        keys = bound.arguments.get("keys")
        if isinstance(keys, Keys) and keys.places_T is not None:
            raise ParallelError("keys of some tokens only cannot be used with rows that have to be padded")
        return bound.args, bound.kwargs

    def after(self, _: nn.Module, __: tuple[Any, ...], results: Any) -> Any:
        """After the model has run: padding is cut off, of everything that has positions."""
        return results if self._length is None else self._cut(results, self._length)

    def _cut(self, results: Any, length: int) -> Any:
        if isinstance(results, Tensor):
            return results.narrow(self.stream.dim, 0, length)
        if isinstance(results, tuple):
            parts = [self._cut(part, length) for part in results]
            return type(results)(*parts) if hasattr(results, "_fields") else tuple(parts)
        return results


def _longer(x: Tensor, dim: int, more: int, value: int) -> Tensor:
    shape = (*x.shape[:dim], more, *x.shape[dim + 1 :])
    return torch.cat([x, x.new_full(shape, value)], dim)
