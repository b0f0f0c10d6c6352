"""From logits to the next token: filters, then one draw a row.

The filters act in this order: repetition penalty, temperature, top-k, top-p, min-p. A draw needs one uniform number
a row, a pure function of (seed, row, n), where `n` counts the tokens drawn so far for that row: what a row says does
not depend on which rows are in its batch.

Shape suffixes: R rows in the batch, V vocabulary, N candidates (or numbers, or tokens of a block), B blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from resilin.config import Settings
from resilin.keys import hash64, philox

_MASK = 0xFFFFFFFF
_BLOCK = 64  # tokens whose probabilities a draw adds up before it looks closer
_NUCLEUS_FIRST_LOOK = 256  # nearly every nucleus is smaller, and 256 candidates cost far less than sorting all


class Sampling(Settings):
    """How the next token is chosen."""

    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Divides the logits; below 1 sharpens, above 1 flattens, 0 is greedy: always the most probable token."""
    top_k: int = Field(default=0, ge=0)
    """Keep only the k most probable tokens; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Keep the smallest set of tokens whose probability reaches p (nucleus sampling); 1 keeps all."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Keep tokens at least this fraction as probable as the most probable one; 0 keeps all."""
    repetition_penalty: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Above 1, tokens already in the prompt or the answer become less probable; 1 changes nothing."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws; the same seed gives the same text."""

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken, so that nothing is drawn."""
        return self.temperature == 0.0


GREEDY = Sampling(temperature=0.0)


def penalise_repetition(logits_RV: Tensor, seen_RV: Tensor, penalty: float) -> Tensor:
    """Make tokens that were already used less probable (Keskar et al., "CTRL", 2019, section 4.1).

    Args:
        logits_RV: float.
        seen_RV: bool, the tokens of the row's prompt and of its answer so far.
        penalty: positive logits are divided by it, negative ones multiplied; > 0.
    """
    if penalty == 1.0:
        return logits_RV
    penalised_RV = torch.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty)
    return torch.where(seen_RV, penalised_RV, logits_RV)


def keep_top_k(logits_RV: Tensor, k_R: Tensor, largest: int) -> Tensor:
    """All but the row's `k_R` largest logits become -inf; among equal logits the lower token ids stay.

    Args:
        logits_RV: float.
        k_R: int64 in [1, largest].
        largest: the greatest value in `k_R`.
    """
    if largest >= logits_RV.shape[1]:
        largest = logits_RV.shape[1]
        k_R = k_R.clamp(max=largest)
    smallest_kept_R1 = logits_RV.topk(largest, dim=1).values.gather(1, k_R[:, None] - 1)
    above_RV = logits_RV > smallest_kept_R1
    level_RV = logits_RV == smallest_kept_R1
    room_R1 = k_R[:, None] - above_RV.sum(1, keepdim=True)
    keep_RV = above_RV | (level_RV & (level_RV.cumsum(1) <= room_R1))
    return logits_RV.masked_fill(~keep_RV, -math.inf)


def keep_top_p(logits_RV: Tensor, p: float) -> Tensor:
    """All but the smallest set of tokens with total probability >= `p` become -inf (Holtzman et al., 2020).

    Ties at the border keep the lower token ids, so the set is the smallest one and always the same.
    """
    if p >= 1.0:
        return logits_RV
    vocabulary = logits_RV.shape[1]
    log_total_R1 = logits_RV.logsumexp(1, keepdim=True).double()
    looked_at = min(_NUCLEUS_FIRST_LOOK, vocabulary)
    while True:
        top_RN = logits_RV.topk(looked_at, dim=1).values.double()
        # The total is rounded to float32: a set whose mass is p within that rounding is enough.
        reached_RN = (top_RN - log_total_R1).exp().cumsum(1) >= p * (1 - 1e-6)
        if looked_at == vocabulary or bool(reached_RN[:, -1].all()):
            break
        looked_at = min(16 * looked_at, vocabulary)
    # Rounding may leave the total of all tokens a hair below p: then all of them are the set.
    size_R = ((~reached_RN).sum(1) + 1).clamp(max=vocabulary)
    return keep_top_k(logits_RV, size_R, int(size_R.max()))


def keep_min_p(logits_RV: Tensor, min_p: float) -> Tensor:
    """Tokens less probable than `min_p` times the most probable one become -inf (Nguyen et al., 2024)."""
    if min_p == 0.0:
        return logits_RV
    floor_R1 = logits_RV.amax(1, keepdim=True) + math.log(min_p)
    return logits_RV.masked_fill(logits_RV < floor_R1, -math.inf)


def filtered(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, top-k, top-p and min-p applied; what is left is the distribution that is drawn from."""
    if sampling.temperature != 1.0:
        logits_RV = logits_RV / sampling.temperature
    if sampling.top_k:
        k = min(sampling.top_k, logits_RV.shape[1])
        logits_RV = keep_top_k(logits_RV, torch.full_like(logits_RV[:, 0], k, dtype=torch.int64), k)
    return keep_min_p(keep_top_p(logits_RV, sampling.top_p), sampling.min_p)


def uniform_numbers(seed: int, rows_R: Tensor, n_RN: Tensor) -> Tensor:
    """Float64 in [0, 1) with 53 random bits, each a function of (seed, row, n) only: those of `Keys`.

    Args:
        seed: any non-negative integer.
        rows_R: int64, the number by which each row's draws are keyed.
        n_RN: int64 (R, N), which of the row's draws; computed together, many cost hardly more than one.

    Returns:
        (R, N).
    """
    key = hash64(seed, "sample")
    counter_RN4 = torch.zeros(*n_RN.shape, 4, dtype=torch.int64, device=n_RN.device)
    counter_RN4[..., 1] = (rows_R & _MASK)[:, None]
    counter_RN4[..., 2] = n_RN & _MASK
    counter_RN4[..., 3] = (n_RN >> 32) & _MASK
    high_RN, low_RN, _, _ = philox(counter_RN4, (key & _MASK, key >> 32)).unbind(-1)
    return ((high_RN >> 5) * 2**26 + (low_RN >> 6)).double() * 2.0**-53


def draw(logits_RV: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each row at which the cumulative probability passes the row's uniform number.

    Found in two steps, the block of tokens first: a running sum over all tokens in float64 costs five times as much
    as everything else here.

    Args:
        logits_RV: float; -inf where nothing may be drawn.
        uniform_R: float64 in [0, 1).

    Returns:
        int64 (R,) tokens, and their float32 (R,) log-probabilities.
    """
    vocabulary = logits_RV.shape[1]
    top_R1 = logits_RV.amax(1, keepdim=True)
    weights_RV = (logits_RV - top_R1).exp_()
    weights_RBN = F.pad(weights_RV, (0, -vocabulary % _BLOCK)).view(len(weights_RV), -1, _BLOCK)
    sums_RB = weights_RBN.sum(2).cumsum(1, dtype=torch.float64)
    total_R1 = sums_RB[:, -1:]
    block_R1 = _first_above(sums_RB, uniform_R[:, None] * total_R1)
    before_R1 = torch.where(block_R1 > 0, sums_RB.gather(1, (block_R1 - 1).clamp(min=0)), 0.0)
    inside_RN = weights_RBN.gather(1, block_R1[:, :, None].expand(-1, 1, _BLOCK))[:, 0]
    place_R1 = _first_above(inside_RN.cumsum(1, dtype=torch.float64), uniform_R[:, None] * total_R1 - before_R1)
    # Non-finite logits can pass through the search as one past the end; `choose` reports them.
    tokens_R1 = (block_R1 * _BLOCK + place_R1).clamp(max=vocabulary - 1)
    logprobs_R1 = logits_RV.gather(1, tokens_R1) - top_R1 - total_R1.log().to(logits_RV.dtype)
    return tokens_R1[:, 0], logprobs_R1[:, 0]


def _first_above(cumulative_RN: Tensor, target_R1: Tensor) -> Tensor:
    """(R, 1): the first place whose running sum is above the target: one where the sum grows, never beyond the end."""
    last_R1 = cumulative_RN[:, -1:]
    # The target may round up to the total itself, beyond the last token.
    below_R1 = torch.minimum(target_R1, torch.nextafter(last_R1, torch.zeros_like(last_R1)))
    return torch.searchsorted(cumulative_RN, below_R1, right=True).clamp(max=cumulative_RN.shape[1] - 1)


def choose(
    logits_RV: Tensor,
    sampling: Sampling,
    rows_R: Tensor,
    n_R: Tensor,
    seen_RV: Tensor | None = None,
    uniform_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of each row.

    Args:
        logits_RV: the model's logits.
        sampling: how to choose.
        rows_R: int64 on the CPU, the number by which each row's draws are keyed.
        n_R: int64 on the CPU, how many tokens were drawn for each row before.
        seen_RV: bool, tokens used so far; needed (not None) for a repetition penalty.
        uniform_R: the rows' `uniform_numbers`, if they are there already.

    Returns:
        tokens_R int64; logprobs_R float32, the token's log-probability under the model (temperature 1, no filter);
        draw_logprobs_R float32, under the distribution it was drawn from (0 when greedy).

    Raises:
        FloatingPointError: a row's logits are not finite.
    """
    logits_RV = logits_RV.float()
    shaped_RV = logits_RV
    if seen_RV is not None:
        shaped_RV = penalise_repetition(logits_RV, seen_RV, sampling.repetition_penalty)
    if sampling.greedy:
        tokens_R = shaped_RV.argmax(1)
        draw_logprobs_R = torch.zeros_like(shaped_RV[:, 0])
    else:
        if uniform_R is None:
            uniform_R = uniform_numbers(sampling.seed, rows_R, n_R[:, None])[:, 0].to(logits_RV.device)
        shaped_RV = filtered(shaped_RV, sampling)
        tokens_R, draw_logprobs_R = draw(shaped_RV, uniform_R)
    logprobs_R = draw_logprobs_R
    if sampling.greedy or shaped_RV is not logits_RV:
        logprobs_R = logits_RV.gather(1, tokens_R[:, None])[:, 0] - logits_RV.logsumexp(1)
    if not bool(logprobs_R.isfinite().all()):
        wrong_R = (~logprobs_R.isfinite()).cpu()
        raise FloatingPointError(
            f"the model gave logits that are not finite at new token {n_R[wrong_R].tolist()} of row(s) "
            f"{rows_R[wrong_R].tolist()}: its weights may be damaged, or its dtype too narrow (try float32)"
        )
    return tokens_R, logprobs_R, draw_logprobs_R
