"""A Mamba-2 layer: projections, a causal convolution, the state space, a gated norm, and the projection back.

    z, x, B, C, dt = maps of the input;    x, B, C = silu(convolution)
    y = scan(x, softplus(dt + dt_bias), -exp(A_log), B, C) + D x;    out(norm(y * silu(z)))

The projections are matrices of their own, so that each can be cut by itself; a Hugging Face folder has them as one.
Shapes: B rows, T tokens, D hidden size, I channels of all heads, H heads, P channels of one, G groups, N state,
C channels of the convolution (I + 2 G N), K tokens it reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resilin.models.cut import BlockCut
from resilin.models.hybrid_settings import HybridSettings
from resilin.models.linear import Linear
from resilin.models.norm import RMSNorm
from resilin.models.row_states import RowStates
from resilin.models.ssd import scan, step


class Depthwise(nn.Module):
    """The weights of a convolution of each channel by itself: (C, 1, K), and (C,) of the bias."""

    bias: nn.Parameter | None

    def __init__(self, channels: int, size: int, bias: bool, device: torch.device | str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, size, device=device))
        self.register_parameter("bias", nn.Parameter(torch.empty(channels, device=device)) if bias else None)


class NewTokens(NamedTuple):
    """Which of some columns are tokens and which padding, where some are.

    Attributes:
        order_BT: brings the tokens of each row to its front, in order.
        back_BT: undoes that.
        count_B: tokens of each row.
    """

    order_BT: Tensor
    back_BT: Tensor
    count_B: Tensor

    @staticmethod
    def of(real_BT: Tensor | None) -> NewTokens | None:
        """None where all are tokens."""
        if real_BT is None:
            return None
        order_BT = (~real_BT).to(torch.int8).argsort(dim=1, stable=True)
        return NewTokens(order_BT, order_BT.argsort(dim=1), real_BT.sum(1))


def _columns(x_BTD: Tensor, order_BT: Tensor) -> Tensor:
    return x_BTD.gather(1, order_BT[..., None].expand_as(x_BTD))


def causal_convolution(
    x_BTC: Tensor,
    weight_C1K: Tensor,
    bias_C: Tensor | None,
    runs_BT: Tensor | None,
    before_BKC: Tensor | None = None,
) -> Tensor:
    """(B, T, C): each channel's last K inputs of the same document, weighted; the last weight is the present one's.

    Args:
        x_BTC: inputs.
        weight_C1K: weights.
        bias_C: added; None: nothing.
        runs_BT: numbers of documents; None: each row is one.
        before_BKC: (B, K - 1, C) inputs before the first; None: zeros.
    """
    T, size = x_BTC.shape[1], weight_C1K.shape[2]
    weight_CK = weight_C1K[:, 0].to(x_BTC.dtype)
    padded = F.pad(x_BTC, (0, 0, size - 1, 0)) if before_BKC is None else torch.cat([before_BKC, x_BTC], 1)
    found = x_BTC * weight_CK[:, -1]
    for back in range(1, size):
        part = padded[:, size - 1 - back : size - 1 - back + T] * weight_CK[:, size - 1 - back]
        if runs_BT is not None:
            same_BT = F.pad(runs_BT[:, back:] == runs_BT[:, :-back], (min(back, T), 0))
            part = part * same_BT[..., None]
        found = found + part
    return found if bias_C is None else found + bias_C.to(found.dtype)


class Mamba2(nn.Module):
    """The layer; `number` is its place among the Mamba-2 layers of a decoder."""

    def __init__(self, settings: HybridSettings, number: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        mamba, width = settings.mamba, settings.hidden_size
        self.number, self.groups, self.heads = number, mamba.groups, mamba.heads
        self.chunk, self.dt_min = mamba.chunk, mamba.dt_min
        self.z = Linear(width, mamba.width, bias=False, device=device)
        self.x = Linear(width, mamba.width, bias=False, device=device)
        self.B = Linear(width, mamba.state_width, bias=False, device=device)
        self.C = Linear(width, mamba.state_width, bias=False, device=device)
        self.dt = Linear(width, mamba.heads, bias=False, device=device)
        self.conv_x = Depthwise(mamba.width, mamba.conv_size, mamba.conv_bias, device)
        self.conv_B = Depthwise(mamba.state_width, mamba.conv_size, mamba.conv_bias, device)
        self.conv_C = Depthwise(mamba.state_width, mamba.conv_size, mamba.conv_bias, device)
        self.A_log = nn.Parameter(torch.empty(mamba.heads, device=device))
        self.D = nn.Parameter(torch.empty(mamba.heads, device=device))
        self.dt_bias = nn.Parameter(torch.empty(mamba.heads, device=device))
        self.norm = RMSNorm(mamba.width, settings.norm_eps, device)
        self.out = Linear(mamba.width, width, bias=False, device=device)

    def forward(
        self,
        u_BTD: Tensor,
        runs_BT: Tensor | None = None,
        states: RowStates | None = None,
        new: NewTokens | None = None,
        cut: BlockCut | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            u_BTD: normed.
            runs_BT: ascending numbers of documents; None: each row is one.
            states: what the layer remembers of each row, read and replaced; None: nothing came before.
            new: with `states`, which columns are tokens; None: all.
            cut: what of the layer is computed; None: all.
        """
        if new is not None:
            u_BTD = _columns(u_BTD, new.order_BT)
        z_BTI, x_BTI, B_BTW, C_BTW, dt_BTH = self._maps(u_BTD, cut)
        A_log_H, D_H, bias_H = (
            one if cut is None else cut.vector(one, f"mamba.{name}")
            for name, one in (("A_log", self.A_log), ("D", self.D), ("dt_bias", self.dt_bias))
        )
        widths = [x_BTI.shape[-1], B_BTW.shape[-1], C_BTW.shape[-1]]
        x_BTC = torch.cat([x_BTI, B_BTW, C_BTW], -1)
        before = None if states is None else states.convolved(self.number, x_BTC)
        weight_C1K, bias_C = self._convolution(cut)
        convolved_BTC = F.silu(causal_convolution(x_BTC, weight_C1K, bias_C, runs_BT, before))
        wide = torch.promote_types(u_BTD.dtype, torch.float32)
        with torch.autocast(u_BTD.device.type, enabled=False):
            x_BTI, B_BTW, C_BTW = convolved_BTC.to(wide).split(widths, -1)
            x_BTI = x_BTI if cut is None else cut.masked(x_BTI, "mamba.scanned")
            H, G = len(A_log_H), self.groups
            x_BTHP = x_BTI.unflatten(-1, (H, -1))
            B_BTGN, C_BTGN = (one.unflatten(-1, (G, -1)) for one in (B_BTW, C_BTW))
            dt_BTH = F.softplus(dt_BTH.to(wide) + bias_H.to(wide)).clamp(min=self.dt_min)
            if new is not None:
                here_BT = torch.arange(dt_BTH.shape[1], device=dt_BTH.device) < new.count_B[:, None]
                dt_BTH = dt_BTH * here_BT[..., None]
            A_H = -A_log_H.to(wide).exp()
            if states is None:
                y_BTHP, _ = scan(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, self.chunk, runs_BT)
            else:
                y_BTHP = self._go_on(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, states)
                states.keep_convolved(self.number, x_BTC, None if new is None else new.count_B)
            y_BTHP = y_BTHP + D_H.to(wide)[:, None] * x_BTHP
            y_BTI = self._normed(y_BTHP.flatten(2) * F.silu(z_BTI.to(wide)), cut)
        y_BTI = y_BTI.to(u_BTD.dtype)
        out_BTD: Tensor = self.out(y_BTI) if cut is None else cut.linear(y_BTI, self.out, "mamba.out")
        return out_BTD if new is None else _columns(out_BTD, new.back_BT)

    def _maps(self, u_BTD: Tensor, cut: BlockCut | None) -> list[Tensor]:
        maps = {"z": self.z, "x": self.x, "B": self.B, "C": self.C, "dt": self.dt}
        return [one(u_BTD) if cut is None else cut.linear(u_BTD, one, f"mamba.{name}") for name, one in maps.items()]

    def _convolution(self, cut: BlockCut | None) -> tuple[Tensor, Tensor | None]:
        parts = {"conv_x": self.conv_x, "conv_B": self.conv_B, "conv_C": self.conv_C}
        found: list[list[Tensor]] = [[], []]
        for name, part in parts.items():
            for kind, kept in (("weight", found[0]), ("bias", found[1])):
                one: Tensor | None = getattr(part, kind)
                if one is not None:
                    kept.append(one if cut is None else cut.vector(one, f"mamba.{name}.{kind}"))
        return torch.cat(found[0]), torch.cat(found[1]) if found[1] else None

    def _go_on(
        self, x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, states: RowStates
    ) -> Tensor:
        H, P, N = *x_BTHP.shape[2:], B_BTGN.shape[-1]
        state_BHPN = states.state(self.number, H, P, N).to(x_BTHP.dtype)
        if x_BTHP.shape[1] == 1:
            y_BHP, state_BHPN = step(x_BTHP[:, 0], dt_BTH[:, 0], A_H, B_BTGN[:, 0], C_BTGN[:, 0], state_BHPN)
            y_BTHP = y_BHP[:, None]
        else:
            y_BTHP, state_BHPN = scan(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, self.chunk, None, state_BHPN)
        states.keep_state(self.number, state_BHPN)
        return y_BTHP

    def _normed(self, y_BTI: Tensor, cut: BlockCut | None) -> Tensor:
        """The norm of each group by itself, with a scale for every channel."""
        name = "mamba.norm.weight"
        weight_I = self.norm.weight if cut is None else cut.vector(self.norm.weight, name)
        share = None if cut is None else cut.share(name)
        y_BTGi = y_BTI.unflatten(-1, (self.groups, -1))
        mean = y_BTGi.square().mean(-1, keepdim=True)
        if share is not None:  # of masked channels, those that are there
            mean = mean / share
        normed_BTI: Tensor = weight_I.to(y_BTI.dtype) * (y_BTGi * (mean + self.norm.eps).rsqrt()).flatten(-2)
        return normed_BTI
