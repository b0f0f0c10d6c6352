"""The expected cost of a model whose sizes are chosen with some probability, differentiable by those.

Any measure is taken that adds up over layers, and in a layer over its axes, once the stream's width is given:
parameters, operations, bytes of cache, or seconds of a table of one's own. It is measured once for each choice; for a
choice made with certainty the expectation is the measure itself.

Shapes: I widths of the stream, L layers, J choices of an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.budgets import Budget
from resilin.nested.cost import cost
from resilin.nested.elastic_space import Axis, ElasticSpace, budget_at, hidden_of

Measure = Literal["parameters", "non_embedding", "flops", "cache"]
Measured = Callable[[DecoderSettings, Budget], float]


def measured_by(measure: Measure, tokens: int | None = None) -> Measured:
    """How a budget is measured.

    Args:
        measure: `cache`: bytes of keys, values and states of a text.
        tokens: of a text, for `flops` and `cache`; None: as many as the model is meant for.
    """

    def found(settings: DecoderSettings, wanted: Budget) -> float:
        length = tokens or settings.max_positions
        told = cost(settings, wanted, sequence_length=length)
        if measure == "cache":
            return float(told.kv_bytes * length + told.state_bytes)
        return float(getattr(told, measure))

    return found


@dataclass(frozen=True)
class CostTable:
    """What everything costs.

    Attributes:
        whole: the full model.
        base_I: without any layer.
        layer_IL: each layer with everything in it.
        less: by (axis, layer), (I, J): how much more (it is less) the layer costs with a choice.
    """

    whole: float
    base_I: Tensor
    layer_IL: Tensor
    less: Mapping[tuple[str, int], Tensor]

    @staticmethod
    def of(settings: DecoderSettings, space: ElasticSpace, axes: Sequence[Axis], measured: Measured) -> CostTable:
        """Measure a model's choices."""
        widths = range(len(space.hidden))
        layers = range(settings.layers)
        hidden = [hidden_of(settings, space, width) for width in widths]
        wholes = [measured(settings, Budget(hidden=size)) for size in hidden]
        layer_IL = torch.zeros(len(widths), len(layers), dtype=torch.float64)
        if len(layers) > 1:
            for width, size in enumerate(hidden):
                for layer in layers:
                    without = measured(settings, Budget(hidden=size, skip=(layer,)))
                    layer_IL[width, layer] = wholes[width] - without
        less: dict[tuple[str, int], Tensor] = {}
        for axis in axes:
            for layer in axis.layers:
                table_IJ = torch.zeros(len(widths), axis.choices, dtype=torch.float64)
                for width, size in enumerate(hidden):
                    for choice in range(axis.choices):
                        wanted = replace(budget_at(settings, axis, space, layer, choice), hidden=size)
                        table_IJ[width, choice] = measured(settings, wanted) - wholes[width]
                less[axis.name, layer] = table_IJ
        base_I = torch.tensor(wholes, dtype=torch.float64) - layer_IL.sum(1)
        return CostTable(wholes[-1], base_I, layer_IL, less)

    def expected(self, axes: Sequence[Axis], shares: Mapping[str, Tensor], kept_L: Tensor | None) -> Tensor:
        """The expected cost as a share of the whole, float64.

        Args:
            axes: of the model.
            shares: by axis, (rows, J) probabilities.
            kept_L: probability that each layer is kept; None: all are.
        """
        layer_IL = self.layer_IL
        columns = list(layer_IL.unbind(1))
        for axis in axes:
            for layer in axis.layers:
                chosen_J = shares[axis.name][axis.row_of(layer)].double()
                columns[layer] = columns[layer] + self.less[axis.name, layer].to(chosen_J.device) @ chosen_J
        total_IL = torch.stack([one.to(columns[-1].device) for one in columns], 1)
        if kept_L is not None:
            total_IL = total_IL * kept_L.double()
        cost_I = self.base_I.to(total_IL.device) + total_IL.sum(1)
        hidden = shares.get("hidden")
        expected = cost_I[-1] if hidden is None else (cost_I * hidden[0].double()).sum()
        return expected / self.whole
