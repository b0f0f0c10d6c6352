"""Attention a tile of queries and keys at a time, under a mask that is a rule: memory grows with the row, not squared.

Softmax over tiles is put together from their maxima and sums (Milakov & Gimelshein, 2018; FlashAttention, Dao et al.,
2022, algorithms 1 and 4): kept are the output and the log of each query's sum, and the backward pass makes the weights
again. Tiles that the rule hides are never touched. torch's flash kernel is quicker where it applies (a plain triangle);
this is for documents, windows and soft-capped logits in rows too long for a whole mask, and for ring attention, which
sees a row piece by piece.

Shapes: B batch, H query heads, K key heads, G = H / K, Q queries, S keys, D head size, N = B * K, R = G * queries of a
tile, C keys of a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resilin.models.mask_rule import MaskRule, Tile
from resilin.models.recompute import nothing_kept

STEPS = {"cpu": (256, 256), "cuda": (1024, 2048)}
"""Queries and keys of a tile: on a CPU its logits stay in a core's cache, a GPU wants enough of them to be busy."""


class Stretch(NamedTuple):
    """What the attention of some queries to some keys needs beside the tensors.

    Attributes:
        rule: of the whole row.
        queries: first place of the queries in the row, and one behind the last.
        keys: the same of the keys.
        scale: factor of the products.
        softcap: c of `c * tanh(logit / c)`, or None.
    """

    rule: MaskRule
    queries: tuple[int, int]
    keys: tuple[int, int]
    scale: float
    softcap: float | None = None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched, in float32 at least."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _rows(x_BHQD: Tensor, span: tuple[int, int], key_heads: int) -> Tensor:
    """(N, R, D): some queries of all heads, those of heads that share a key head below one another."""
    x_BHRD = x_BHQD[:, :, span[0] : span[1]]
    return x_BHRD.reshape(x_BHRD.shape[0] * key_heads, -1, x_BHRD.shape[3])


def _heads(x_NRD: Tensor, batch: int, queries: int) -> Tensor:
    """The reverse of `_rows`, (B, H, queries, D)."""
    return x_NRD.reshape(batch, -1, queries, x_NRD.shape[2])


class _Tiles:
    """The tiles of one call, and what is the same for all of them."""

    def __init__(self, q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, stretch: Stretch) -> None:
        self.stretch = stretch
        self.B, self.H, self.Q, self.D = q_BHQD.shape
        self.K, self.S = k_BKSD.shape[1:3]
        self.q_BHQD, self.k_NSD, self.v_NSD = q_BHQD, k_BKSD.flatten(0, 1), v_BKSD.flatten(0, 1)
        self.wide = torch.promote_types(q_BHQD.dtype, torch.float32)
        self.query_place = torch.arange(*stretch.queries, device=q_BHQD.device)
        self.key_place = torch.arange(*stretch.keys, device=q_BHQD.device)
        steps = STEPS["cpu" if q_BHQD.device.type == "cpu" else "cuda"]
        self.groups = list(stretch.rule.tiles(stretch.queries, stretch.keys, *steps))

    def logits(self, q_NRD: Tensor, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """Logits (N, R, C) with -inf where nothing is seen, and the slope of the soft-cap."""
        rows, columns = slice(*tile.queries), slice(*tile.keys)
        logits_NRC = _product(q_NRD, self.k_NSD[:, columns].transpose(1, 2)).mul_(self.stretch.scale)
        slope_NRC, cap = None, self.stretch.softcap
        if cap is not None:
            logits_NRC.div_(cap).tanh_()
            slope_NRC = 1 - logits_NRC.square()
            logits_NRC.mul_(cap)
        if tile.masked:
            seen_BQC = self.stretch.rule.seen(self.query_place[rows], self.key_place[columns])
            B, (queries, count) = self.B, seen_BQC.shape[1:]
            logits_NRC.view(B, -1, queries, count).masked_fill_(~seen_BQC[:, None], -torch.inf)
        return logits_NRC, slope_NRC


def attend(q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, stretch: Stretch) -> tuple[Tensor, Tensor]:
    """Mixed values (B, H, Q, D), and the logarithm of each query's sum of exponentials (B, H, Q), in float32 at least.

    A query that sees no key has zeros and -inf. No graph is recorded.
    """
    tiles = _Tiles(q_BHQD, k_BKSD, v_BKSD, stretch)
    mixed_BHQD = torch.zeros_like(q_BHQD, dtype=tiles.wide, memory_format=torch.contiguous_format)
    log_sum_BHQ = torch.full(q_BHQD.shape[:3], -torch.inf, dtype=tiles.wide, device=q_BHQD.device)
    for span, group in tiles.groups:
        if not group:
            continue
        q_NRD = _rows(q_BHQD, span, tiles.K)
        top_NR1 = torch.full((*q_NRD.shape[:2], 1), -torch.inf, dtype=tiles.wide, device=q_BHQD.device)
        sum_NR1, mixed_NRD = torch.zeros_like(top_NR1), torch.zeros_like(q_NRD, dtype=tiles.wide)
        for tile in group:
            logits_NRC, _ = tiles.logits(q_NRD, tile)
            new_NR1 = torch.maximum(top_NR1, logits_NRC.amax(-1, keepdim=True))
            base_NR1 = new_NR1.masked_fill(new_NR1 == -torch.inf, 0.0)
            weights_NRC = logits_NRC.sub_(base_NR1).exp_()
            shrink_NR1 = (top_NR1 - base_NR1).exp_()
            sum_NR1 = sum_NR1 * shrink_NR1 + weights_NRC.sum(-1, keepdim=True)
            more_NRD = _product(weights_NRC.to(v_BKSD.dtype), tiles.v_NSD[:, slice(*tile.keys)])
            mixed_NRD = mixed_NRD.mul_(shrink_NR1).add_(more_NRD)
            top_NR1 = new_NR1
        mixed_NRD /= sum_NR1.masked_fill(sum_NR1 == 0, 1.0)
        queries = span[1] - span[0]
        mixed_BHQD[:, :, slice(*span)] = _heads(mixed_NRD, tiles.B, queries)
        log_sum_BHQ[:, :, slice(*span)] = _heads(top_NR1 + sum_NR1.log(), tiles.B, queries)[..., 0]
    return mixed_BHQD, log_sum_BHQ


def gradients(
    grad_BHQD: Tensor,
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    dot_BHQ: Tensor,
    log_sum_BHQ: Tensor,
    stretch: Stretch,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys contribute to the gradients of queries, keys and values, in float32 at least.

    Args:
        grad_BHQD: of the mixed values over *all* keys.
        q_BHQD: queries.
        k_BKSD: keys.
        v_BKSD: values.
        dot_BHQ: sum over D of gradient times mixed values over all keys.
        log_sum_BHQ: over all keys.
        stretch: which queries and keys these are.
    """
    tiles = _Tiles(q_BHQD, k_BKSD, v_BKSD, stretch)
    grad_q = torch.zeros_like(q_BHQD, dtype=tiles.wide, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros_like(x, dtype=tiles.wide) for x in (tiles.k_NSD, tiles.v_NSD))
    for span, group in tiles.groups:
        q_NRD, own_NRD = _rows(q_BHQD, span, tiles.K), _rows(grad_BHQD.to(q_BHQD.dtype), span, tiles.K)
        log_sum_NR1 = _rows(log_sum_BHQ[..., None], span, tiles.K)
        log_sum_NR1 = log_sum_NR1.masked_fill(log_sum_NR1 == -torch.inf, 0.0)
        dot_NR1, pull_q = _rows(dot_BHQ[..., None], span, tiles.K), torch.zeros_like(q_NRD, dtype=tiles.wide)
        for tile in group:
            columns = slice(*tile.keys)
            logits_NRC, slope_NRC = tiles.logits(q_NRD, tile)
            weights_NRC = logits_NRC.sub_(log_sum_NR1).exp_()
            grad_v[:, columns] += _product(weights_NRC.to(own_NRD.dtype).transpose(1, 2), own_NRD)
            pull_NRC = _product(own_NRD, tiles.v_NSD[:, columns].transpose(1, 2))
            pull_NRC = pull_NRC.sub_(dot_NR1).mul_(weights_NRC).mul_(stretch.scale)
            if slope_NRC is not None:
                pull_NRC.mul_(slope_NRC)
            narrow_NRC = pull_NRC.to(q_NRD.dtype)
            pull_q += _product(narrow_NRC, tiles.k_NSD[:, columns])
            grad_k[:, columns] += _product(narrow_NRC.transpose(1, 2), q_NRD)
        grad_q[:, :, slice(*span)] = _heads(pull_q, tiles.B, span[1] - span[0])
    return grad_q, grad_k.view(k_BKSD.shape), grad_v.view(v_BKSD.shape)


class _TiledAttention(torch.autograd.Function):
    """(q, k, v, stretch) -> mixed values."""

    @staticmethod
    def forward(ctx: Any, q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, stretch: Stretch) -> Tensor:
        with nothing_kept():
            mixed_BHQD, log_sum_BHQ = attend(q_BHQD, k_BKSD, v_BKSD, stretch)
        mixed_BHQD = mixed_BHQD.to(q_BHQD.dtype)
        ctx.save_for_backward(q_BHQD, k_BKSD, v_BKSD, mixed_BHQD, log_sum_BHQ)
        ctx.stretch = stretch
        return mixed_BHQD

    @staticmethod
    def backward(ctx: Any, grad_BHQD: Tensor) -> tuple[Tensor | None, ...]:
        q_BHQD, k_BKSD, v_BKSD, mixed_BHQD, log_sum_BHQ = ctx.saved_tensors
        refuse_second_derivative()
        dot_BHQ = (grad_BHQD.to(log_sum_BHQ.dtype) * mixed_BHQD).sum(-1)
        found = gradients(grad_BHQD, q_BHQD, k_BKSD, v_BKSD, dot_BHQ, log_sum_BHQ, ctx.stretch)
        return (*(grad.to(q_BHQD.dtype) for grad in found), None)


def refuse_second_derivative() -> None:
    """Raise where a gradient of this gradient is wanted: it would count as a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "attention in tiles has no gradient of its gradient; it is taken for rows of more than 4,096 tokens, and "
            "in ring attention: use shorter rows, or parallel.context_kind = 'ulysses'"
        )


def tiled_attention(
    q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, rule: MaskRule, softcap: float | None = None
) -> Tensor:
    """`softmax(cap(scale * q.k)) v` of the last Q queries of whole rows, where queries see what the rule says.

    Args:
        q_BHQD: queries; head h reads key head h // (H / K). Any float format; sums are float32 at least.
        k_BKSD: keys.
        v_BKSD: values.
        scale: factor of the products.
        rule: of rows of S tokens.
        softcap: of the logits, or None.

    Returns:
        (B, H, Q, D).
    """
    Q, S = q_BHQD.shape[2], k_BKSD.shape[2]
    mixed: Tensor = _TiledAttention.apply(q_BHQD, k_BKSD, v_BKSD, Stretch(rule, (S - Q, S), (0, S), scale, softcap))
    return mixed
