"""The likeliest sizes that cost what was asked for.

A router's probabilities meet a target on average; the likeliest sizes of each layer, taken one by one, need not. Here
sizes are chosen together: of all combinations whose cost is near enough to the target, the one that the router gives
the largest probability. Once the width of the stream and the layers are fixed, costs and logarithms add up over
choices, so that it is a knapsack, solved exactly on a grid of costs.

Shapes: R choices that are made, J sizes of a choice, C costs on the grid, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resilin.nested.elastic_cost import CostTable
from resilin.nested.elastic_space import Axis

_FINE = 4  # cells of the grid in the tolerance, for each choice: what rounding adds up to is an eighth of it


class Picked(NamedTuple):
    """A combination.

    Attributes:
        miss: how far beyond the tolerance its cost is; 0: it is within.
        likelihood: logarithm of its probability.
        sizes: of each choice.
    """

    miss: float
    likelihood: float
    sizes: list[int]

    def better(self, other: Picked | None) -> bool:
        """Whether it is to be taken in the place of another one."""
        return other is None or (self.miss, -self.likelihood) < (other.miss, -other.likelihood)


def fitting(
    logits: Mapping[str, Tensor],
    axes: Sequence[Axis],
    costs: CostTable,
    kept_JL: Tensor,
    most: Mapping[str, Sequence[int]],
    wanted: float,
    within: float,
) -> dict[str, list[int]]:
    """By axis, the likeliest choices whose cost is near enough; the nearest ones where none is.

    Args:
        logits: of the router, (R, J) of each axis.
        axes: of the model.
        costs: of all choices.
        kept_JL: which layers each choice of depth keeps.
        most: by axis, the largest choices that are allowed.
        wanted: the cost, as a share of the whole.
        within: how far from it a cost may be, as a share of it.
    """
    likely = {name: one.detach().double().cpu().log_softmax(-1) for name, one in logits.items()}
    inside = [(axis, row) for axis in axes if axis.layers for row in range(axis.rows)]
    allowed = [likely[axis.name][row, : most[axis.name][row] + 1] for axis, row in inside]

    def sizes_of(name: str, count: int) -> list[tuple[int, float]]:
        if name not in likely:
            return [(count - 1, 0.0)]
        return list(enumerate(likely[name][0, : most[name][0] + 1].tolist()))

    best: Picked | None = None
    around: dict[str, int] = {}
    for width, of_width in sizes_of("hidden", len(costs.base_I)):
        for depth, of_depth in sizes_of("depth", len(kept_JL)):
            kept_L = kept_JL[depth].double().cpu()
            full = float(costs.base_I[width] + costs.layer_IL[width] @ kept_L) / costs.whole
            less = [
                torch.stack([kept_L[layer] * costs.less[axis.name, layer][width, : len(chances)] for layer in layers])
                for (axis, layers), chances in zip(_layers_of(inside), allowed, strict=True)
            ]
            saved = [one.sum(0) / -costs.whole for one in less]
            found = _knapsack(allowed, saved, full - wanted, within * wanted)
            found = found._replace(likelihood=found.likelihood + of_width + of_depth)
            if found.better(best):
                best, around = found, {"hidden": width, "depth": depth}
    assert best is not None
    chosen: dict[str, list[int]] = {name: [around[name]] for name in ("hidden", "depth") if name in likely}
    for (axis, _), size in zip(inside, best.sizes, strict=True):
        chosen.setdefault(axis.name, []).append(size)
    return chosen


def _layers_of(inside: Sequence[tuple[Axis, int]]) -> list[tuple[Axis, tuple[int, ...]]]:
    """For each choice the layers that it is about."""
    return [(axis, (axis.layers[row],) if axis.by_layer else axis.layers) for axis, row in inside]


def _knapsack(chances: Sequence[Tensor], saved: Sequence[Tensor], wanted: float, within: float) -> Picked:
    """One size of each choice, together saving `wanted`, give or take `within`, as likely as can be.

    Args:
        chances: of each choice, (J,) logarithms of probabilities.
        saved: of each choice, (J,) what a size saves.
        wanted: in all.
        within: positive.
    """
    cell = within / (_FINE * max(len(chances), 1))
    steps = [(one / cell).round().long() for one in saved]
    size = sum(int(one.max()) for one in steps) + 1
    best_C = torch.full((size,), -torch.inf, dtype=torch.float64)
    best_C[0] = 0.0
    taken: list[Tensor] = []
    for chance_J, step_J in zip(chances, steps, strict=True):
        next_C, size_C = torch.full_like(best_C, -torch.inf), torch.zeros(size, dtype=torch.int64)
        for number, (chance, step) in enumerate(zip(chance_J.tolist(), step_J.tolist(), strict=True)):
            moved_C = torch.full_like(best_C, -torch.inf)
            moved_C[step:] = best_C[: size - step] + chance
            size_C[moved_C > next_C] = number
            next_C = torch.maximum(next_C, moved_C)
        best_C = next_C
        taken.append(size_C)
    off_C = (torch.arange(size, dtype=torch.float64) * cell - wanted).abs()
    off_C[best_C == -torch.inf] = torch.inf
    near_C = off_C <= within * (1 - 0.5 / _FINE)
    place = int(torch.where(near_C, best_C, -torch.inf).argmax()) if near_C.any() else int(off_C.argmin())
    likelihood, sizes, at = float(best_C[place]), [], place
    for size_C, step_J in zip(reversed(taken), reversed(steps), strict=True):
        sizes.append(int(size_C[at]))
        at -= int(step_J[sizes[-1]])
    return Picked(0.0 if near_C.any() else float(off_C[place]), likelihood, sizes[::-1])
