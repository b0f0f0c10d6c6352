"""From logits to the next token: filters, then one draw a row.

The filters act in this order: repetition penalty, temperature, top-k, top-p, min-p. A draw needs one uniform number
a row, a pure function of (seed, row, n), where `n` counts the tokens drawn so far for that row: what a row says does
not depend on which rows are in its batch.

Shape suffixes: R rows in the batch, V vocabulary, N candidates.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from resilin.config import Settings
from resilin.keys import Keys

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
    logits_RV = logits_RV / sampling.temperature
    if sampling.top_k:
        k = min(sampling.top_k, logits_RV.shape[1])
        logits_RV = keep_top_k(logits_RV, torch.full_like(logits_RV[:, 0], k, dtype=torch.int64), k)
    return keep_min_p(keep_top_p(logits_RV, sampling.top_p), sampling.min_p)


def uniform_numbers(seed: int, rows_R: Tensor, n: int, device: torch.device | str = "cpu") -> Tensor:
    """(R,) float64 in [0, 1) with 53 random bits, each a function of (seed, row, n) only."""
    high_R, low_R = Keys(seed, n, rows_R, ("sample",)).bits((2,), device).unbind(1)
    return ((high_R >> 5) * 2**26 + (low_R >> 6)).double() * 2.0**-53


def draw(logits_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The token of each row at which the cumulative probability passes the row's uniform number; int64 (R,)."""
    cumulative_RV = logits_RV.softmax(1).cumsum(1, dtype=torch.float64)
    total_R1 = cumulative_RV[:, -1:]
    # u * total may round up to the total itself, beyond the last token.
    below_total_R1 = torch.nextafter(total_R1, torch.zeros_like(total_R1))
    target_R1 = torch.minimum(uniform_R[:, None] * total_R1, below_total_R1)
    return torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]


def choose(
    logits_RV: Tensor, sampling: Sampling, rows_R: Tensor, n: int, seen_RV: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of each row.

    Args:
        logits_RV: the model's logits.
        sampling: how to choose.
        rows_R: int64, the number by which each row's draws are keyed.
        n: how many tokens were drawn for these rows before.
        seen_RV: bool, tokens used so far; needed (not None) for a repetition penalty.

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
    else:
        shaped_RV = filtered(shaped_RV, sampling)
        tokens_R = draw(shaped_RV, uniform_numbers(sampling.seed, rows_R, n, logits_RV.device))
        # Non-finite logits can pass through the search as one past the end; they are reported below.
        tokens_R = tokens_R.clamp(max=logits_RV.shape[1] - 1)
    chosen_R1 = tokens_R[:, None]
    logprobs_R = logits_RV.gather(1, chosen_R1)[:, 0] - logits_RV.logsumexp(1)
    if not bool(logprobs_R.isfinite().all()):
        bad = rows_R[(~logprobs_R.isfinite()).cpu()].tolist()
        raise FloatingPointError(
            f"the model gave logits that are not finite at new token {n} of row(s) {bad}: its weights may be "
            "damaged, or its dtype too narrow (try float32)"
        )
    if sampling.greedy:
        return tokens_R, logprobs_R, torch.zeros_like(logprobs_R)
    draw_logprobs_R = shaped_RV.gather(1, chosen_R1)[:, 0] - shaped_RV.logsumexp(1)
    return tokens_R, logprobs_R, draw_logprobs_R
