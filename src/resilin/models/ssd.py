"""The state space of Mamba-2, many tokens at a time (Dao and Gu, "Transformers are SSMs", 2024, section 6).

For each head, with a decay A < 0, steps dt > 0 and a state h of P channels by N numbers:

    h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T,    y_t = h_t C_t

Inside a chunk of Q tokens y is a product of the masked matrix `exp(sum of dt A) * (C B^T)` with dt x; from chunk to
chunk the state is carried. Everything is computed in float32 at least.

Shapes: B rows, T tokens, H heads, G groups of R heads that share B and C, P channels, N state, K chunks of Q (or S)
tokens, W values of the heads of a group (R P).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: y (B, H, P) and the state after it."""
    B, H, P = x_BHP.shape
    G, N = B_BGN.shape[1:]
    decay_BH = (dt_BH * A_H).exp()
    taken_BGW1 = (x_BHP * dt_BH[..., None]).view(B, G, -1, 1)
    state_BHPN = decay_BH[..., None, None] * state_BHPN + (taken_BGW1 * B_BGN[:, :, None]).view(B, H, P, N)
    y_BGW1: Tensor = state_BHPN.view(B, G, -1, N) @ C_BGN[..., None]
    return y_BGW1.view(B, H, P), state_BHPN


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, T, ...) -> (B, K, Q, ...), the last chunk filled with zeros."""
    short = -x.shape[1] % chunk
    if short:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, short))
    found: Tensor = x.unflatten(1, (-1, chunk))
    return found


class _Runs(NamedTuple):
    """Where documents lie in chunks.

    Attributes:
        same_BKQS: whether two tokens of a chunk are of one document.
        at_end_BKQ: whether a token's document is that of the chunk's last token.
        from_before_BKQ: whether it is that of the last token of the chunk before.
        goes_on_BK: whether a whole chunk is of that document.
    """

    same_BKQS: Tensor
    at_end_BKQ: Tensor
    from_before_BKQ: Tensor
    goes_on_BK: Tensor

    @staticmethod
    def of(runs_BT: Tensor, chunk: int) -> _Runs:
        short = -runs_BT.shape[1] % chunk
        last_B1 = runs_BT[:, -1:]
        runs_BKQ = torch.cat([runs_BT, last_B1.expand(-1, short)], 1).unflatten(1, (-1, chunk))
        last_BK = runs_BKQ[..., -1]
        # The first chunk has nothing before it, and the state that it reads is zeros: any number will do.
        before_BK = torch.cat([runs_BKQ[:, :1, 0], last_BK[:, :-1]], 1)
        return _Runs(
            runs_BKQ[..., :, None] == runs_BKQ[..., None, :],
            runs_BKQ == last_BK[..., None],
            runs_BKQ == before_BK[..., None],
            last_BK == before_BK,
        )


def scan(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    chunk: int,
    runs_BT: Tensor | None = None,
    state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Y (B, T, H, P) of whole texts, and the state (B, H, P, N) after their last token.

    Args:
        x_BTHP: inputs.
        dt_BTH: steps; a token whose step is 0 leaves the state as it is.
        A_H: negative.
        B_BTGN: how inputs enter the state.
        C_BTGN: how outputs are read from it.
        chunk: tokens computed side by side.
        runs_BT: ascending; where the number changes a new document begins, with a state of zeros. None: one document.
        state_BHPN: before the first token; None: zeros. Not with `runs_BT`.

    Raises:
        ValueError: both `runs_BT` and `state_BHPN` are given.
    """
    if runs_BT is not None and state_BHPN is not None:
        raise ValueError("documents begin with a state of zeros: give runs_BT or state_BHPN, not both")
    B, T, H, P = x_BTHP.shape
    G, N = B_BTGN.shape[2:]
    R, chunk = H // G, min(chunk, T)
    B_BGKQN, C_BGKQN = (_in_chunks(x, chunk).permute(0, 3, 1, 2, 4) for x in (B_BTGN, C_BTGN))
    decay_BGKRQ = _in_chunks(dt_BTH * A_H, chunk).unflatten(-1, (G, R)).permute(0, 3, 1, 4, 2)
    taken_BGKQRP = _in_chunks(x_BTHP * dt_BTH[..., None], chunk).unflatten(3, (G, R)).permute(0, 3, 1, 2, 4, 5)
    upto_BGKRQ = decay_BGKRQ.cumsum(-1)
    left_BGKRQ = upto_BGKRQ[..., -1:] - upto_BGKRQ
    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=x_BTHP.device).tril()
    within = None if runs_BT is None else _Runs.of(runs_BT, chunk)
    if within is not None:
        seen = seen & within.same_BKQS[:, None, :, None]
        left_BGKRQ = left_BGKRQ.masked_fill(~within.at_end_BKQ[:, None, :, None], -torch.inf)
    # What lies outside is set to 0 before the exponential: above the diagonal it would overflow.
    gaps_BGKRQS = (upto_BGKRQ[..., :, None] - upto_BGKRQ[..., None, :]).masked_fill(~seen, -torch.inf)
    mixed_BGKRQS = (C_BGKQN @ B_BGKQN.transpose(-1, -2))[:, :, :, None] * gaps_BGKRQS.exp()
    y_BGKRQP = mixed_BGKRQS @ taken_BGKQRP.transpose(3, 4)
    # The heads of a group share B and C: here they are columns of one product.
    weighed_BGKQW = (taken_BGKQRP * left_BGKRQ.exp().transpose(-1, -2)[..., None]).flatten(-2)
    added_BGKRPN = (weighed_BGKQW.transpose(-1, -2) @ B_BGKQN).unflatten(-2, (R, P))
    kept_BGKR = upto_BGKRQ[..., -1].exp()
    if within is not None:
        kept_BGKR = kept_BGKR * within.goes_on_BK[:, None, :, None]
    if state_BHPN is None:
        state = x_BTHP.new_zeros(B, G, R, P, N)
    else:
        state = state_BHPN.to(x_BTHP.dtype).reshape(B, G, R, P, N)
    before = []
    for k in range(kept_BGKR.shape[2]):
        before.append(state)
        state = kept_BGKR[:, :, k, :, None, None] * state + added_BGKRPN[:, :, k]
    if len(before) > 1 or state_BHPN is not None:
        reach_BGKRQ = upto_BGKRQ.exp()
        if within is not None:
            reach_BGKRQ = reach_BGKRQ * within.from_before_BKQ[:, None, :, None]
        before_BGKWN = torch.stack(before, 2).flatten(3, 4)
        read_BGKQRP = (C_BGKQN @ before_BGKWN.transpose(-1, -2)).unflatten(-1, (R, P))
        y_BGKRQP = y_BGKRQP + read_BGKQRP.transpose(3, 4) * reach_BGKRQ[..., None]
    y_BTHP = y_BGKRQP.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, H, P)[:, :T]
    return y_BTHP, state.reshape(B, H, P, N)
