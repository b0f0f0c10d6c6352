"""Feed-forward layers: gated (SwiGLU, GEGLU) or plain.

Shapes: ... any leading dimensions, D hidden size, F feed-forward size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.models.chain_linear import ChainLinear, linear_of
from resilin.models.cut import BlockCut
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.linear import Linear


def activate(x: Tensor, kind: str) -> Tensor:
    """The non-linearity called `kind`: silu, gelu (with erf), gelu_tanh, or relu2 (the square of relu)."""
    if kind == "silu":
        return F.silu(x)
    if kind == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class MLP(nn.Module):
    """`down(act(gate(x)) * up(x))` (Shazeer, GLU variants, 2020), or `down(act(up(x)))` when not gated."""

    def __init__(self, settings: DecoderSettings, size: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.activation = settings.activation
        chained, bias = settings.chains is not None, settings.mlp_bias
        hidden = settings.widths.hidden
        neurons = settings.widths.mlp if chained else (size,)
        self.gate: Linear | ChainLinear | None = None
        if settings.gated:
            self.gate = linear_of(chained, hidden, neurons, bias, device)
        self.up = linear_of(chained, hidden, neurons, bias, device)
        self.down = linear_of(chained, neurons, hidden, bias, device)

    def forward(self, x: Tensor, cut: BlockCut | None = None, name: str = "mlp") -> Tensor:
        """(..., D) -> (..., D).

        Args:
            x: each token by itself.
            cut: what of the block is computed; None: all.
            name: of this module in the block.
        """
        if cut is not None:
            return self._cut(x, cut, name)
        if self.gate is None:
            out: Tensor = self.down(activate(self.up(x), self.activation))
        else:
            out = self.down(activate(self.gate(x), self.activation) * self.up(x))
        return out

    def _cut(self, x: Tensor, cut: BlockCut, name: str) -> Tensor:
        up = cut.linear(x, self.up, f"{name}.up")
        if self.gate is None:
            hidden = activate(up, self.activation)
        else:
            hidden = activate(cut.linear(x, self.gate, f"{name}.gate"), self.activation) * up
        return cut.linear(hidden, self.down, f"{name}.down")
