"""Parameters that have a name and a shape here, and whose memory is elsewhere, row by row.

A model may be larger than the memory it is computed in. What then stays of a stack of matrices is a parameter on the
meta device: it is named, counted and grouped like any other, but holds no element and never has a `.grad`. Who lends
its rows says so with `give_rows`; a row's gradient is None in a step that had no use for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor, nn

_ROWS = "gradient_rows"


class HasGradient(Protocol):
    """A parameter, or whatever has a gradient in its place."""

    grad: Tensor | None


class GradientRows(Protocol):
    """The gradient of a parameter whose memory is elsewhere."""

    @property
    def holders(self) -> Sequence[HasGradient]:
        """Who has it, one for each index of the first dimension; several parameters may share them."""

    def rows(self) -> list[Tensor | None]:
        """The gradient at each index of the first dimension; None: it is zero, and was never computed."""


def give_rows(parameter: nn.Parameter, rows: GradientRows) -> None:
    """Say who has the gradient of a parameter on the meta device."""
    setattr(parameter, _ROWS, rows)


def rows_of(parameter: nn.Parameter) -> GradientRows | None:
    """Who has a parameter's gradient, where it does not have it itself."""
    rows: GradientRows | None = getattr(parameter, _ROWS, None)
    return rows


def gradient_holders(parameters: Iterable[nn.Parameter]) -> list[HasGradient]:
    """The parameters that have their gradients themselves, and for the others those who have them, once each."""
    found: dict[int, HasGradient] = {}
    for parameter in parameters:
        rows = rows_of(parameter)
        for holder in (parameter,) if rows is None else rows.holders:
            found.setdefault(id(holder), holder)
    return list(found.values())


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor | list[Tensor | None]]:
    """The gradients that there are, in the order of parameters: a tensor, or the rows of one."""
    found: list[Tensor | list[Tensor | None]] = []
    for parameter in parameters:
        rows = rows_of(parameter)
        if rows is None:
            if parameter.grad is not None:
                found.append(parameter.grad)
        else:
            mine = rows.rows()
            if any(row is not None for row in mine):
                found.append(mine)
    return found
