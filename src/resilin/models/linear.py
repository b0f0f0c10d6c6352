"""Linear maps and embeddings whose weights are left for `initial.py` or a loader to fill."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS = 32  # that the order is chosen for; any number may come


class PackedWeight:
    """A weight kept in the order in which oneDNN multiplies with it: for many products with a few rows each.

    BLAS brings a weight into an order of its own anew for every product, which for the head of a model costs as much
    as the few rows of a decoding step themselves: packed, 2 to 64 rows take half the time or less. The order costs a
    copy of the weight, made once; later changes of the weight are not seen.

    Args:
        weight: (V, D); see `takes`.
    """

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether it can be packed: float32 on the CPU, with a torch that brings oneDNN."""
        has_operations = hasattr(torch.ops.mkldnn, "_linear_pointwise")
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and has_operations
        )

    def __call__(self, x: Tensor) -> Tensor:
        """`x @ weight.T`, (R, D) float32 -> (R, V), without gradients."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return product


class Linear(nn.Linear):
    """`nn.Linear` that draws nothing when made: initial weights are keyed by parameter name."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws nothing when made."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""
