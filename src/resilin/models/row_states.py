"""What recurrent layers remember of each row of a batch, for decoding one token at a time.

Of a layer that is run with fewer heads, channels or state, the first of what is kept here are used.
Shapes: L layers, B rows, K inputs that a convolution still needs, C its channels, H heads, P channels of one, N state.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowStates:
    """The last inputs of each layer's convolution, and its state; zeros before the first token."""

    def __init__(self, conv_LBKC: Tensor, state_LBHPN: Tensor) -> None:
        self.conv_LBKC, self.state_LBHPN = conv_LBKC, state_LBHPN

    def convolved(self, layer: int, like_BTC: Tensor) -> Tensor:
        """(B, K, C) inputs before the new ones, as many channels as these have."""
        return self.conv_LBKC[layer, :, :, : like_BTC.shape[-1]].to(like_BTC.dtype)

    def keep_convolved(self, layer: int, x_BTC: Tensor, count_B: Tensor | None) -> None:
        """Keep the last inputs of each row.

        Args:
            layer: of which.
            x_BTC: the new ones.
            count_B: how many of each row's are tokens, the first; None: all.
        """
        kept = self.conv_LBKC.shape[2]
        both = torch.cat([self.convolved(layer, x_BTC), x_BTC.detach()], 1)
        if count_B is None:
            last = both[:, -kept:]
        else:
            place_BK = count_B[:, None] + torch.arange(kept, device=both.device)
            last = both.gather(1, place_BK[..., None].expand(-1, -1, both.shape[-1]))
        self.conv_LBKC[layer, :, :, : x_BTC.shape[-1]] = last

    def state(self, layer: int, heads: int, channels: int, numbers: int) -> Tensor:
        """(B, H, P, N)."""
        return self.state_LBHPN[layer, :, :heads, :channels, :numbers]

    def keep_state(self, layer: int, state_BHPN: Tensor) -> None:
        """Keep a layer's state."""
        H, P, N = state_BHPN.shape[1:]
        self.state_LBHPN[layer, :, :H, :P, :N] = state_BHPN.detach()

    def free(self, rows: Tensor) -> None:
        """Forget these rows."""
        self.conv_LBKC.index_fill_(1, rows, 0)
        self.state_LBHPN.index_fill_(1, rows, 0)

    def fill(self, rows: Tensor, source: RowStates, of_source: Tensor) -> None:
        """Put other rows in place of these."""
        self.conv_LBKC[:, rows] = source.conv_LBKC[:, of_source]
        self.state_LBHPN[:, rows] = source.state_LBHPN[:, of_source]

    def keep_rows(self, rows: Tensor) -> None:
        """Keep (or repeat, or reorder) the rows at these indices."""
        self.conv_LBKC = self.conv_LBKC.index_select(1, rows)
        self.state_LBHPN = self.state_LBHPN.index_select(1, rows)
