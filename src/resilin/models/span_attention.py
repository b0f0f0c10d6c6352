"""Causal attention inside documents that lie one behind another, as matrix products over blocks of queries.

Only products between a query and keys it sees (and those of the block on the diagonal) are made; nothing is computed
between documents. A document that goes on from another meets that one's keys before its own. The attention weights
are kept for the backward pass; a document too long for that goes through torch's flash kernel instead, and documents of
a few tokens go through their products together, padded.

Shapes: N tokens of all rows, H query heads, K key heads, G = H / K, D head size, L queries of a document, S keys,
R queries of a block, M tiny documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resilin.models.block_attention import BLOCK, LONGEST
from resilin.models.mask import LARGEST
from resilin.models.mask_rule import MaskRule
from resilin.models.recompute import nothing_kept
from resilin.models.spans import Span
from resilin.models.tiled_attention import tiled_attention

_TINY = 32  # keys up to which a document's products cost less than the calls that make them
_FEW = 4  # tiny documents from which on they go together


@cache
def _hidden(dtype: torch.dtype) -> Tensor:
    """(BLOCK, LONGEST + BLOCK): what is added to the products of a block: zeros, and a triangle of -inf at the end."""
    bias = torch.zeros(BLOCK, LONGEST + BLOCK, dtype=dtype)
    bias[:, LONGEST:] = torch.full((BLOCK, BLOCK), -torch.inf, dtype=dtype).triu(1)
    return bias


def _blocks(queries: int) -> list[tuple[int, int]]:
    """A document's queries in even blocks: a last block of a few would cost nearly a whole one."""
    count = -(-queries // BLOCK)
    size = -(-queries // count)
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


def _stacked(x_NHD: Tensor, start: int, stop: int, key_heads: int) -> Tensor:
    """(K, G * R, D): some tokens of all heads; the heads that share a key head below one another."""
    _, H, D = x_NHD.shape
    x_RHD = x_NHD[start:stop]
    if key_heads == H:
        return x_RHD.transpose(0, 1)
    return x_RHD.view(stop - start, key_heads, H // key_heads, D).permute(1, 2, 0, 3).reshape(key_heads, -1, D)


def _put(x_NHD: Tensor, start: int, stop: int, stacked_KRD: Tensor) -> None:
    """The reverse of `_stacked`, into some tokens."""
    _, H, D = x_NHD.shape
    K, R = len(stacked_KRD), stop - start
    x_NHD[start:stop].view(R, K, H // K, D).copy_(stacked_KRD.view(K, H // K, R, D).permute(2, 0, 1, 3))


def _seen(x_NKD: Tensor, span: Span) -> Tensor:
    """(K, S, D): keys or values that a document sees: those it goes on from, then its own."""
    own, (first, last) = x_NKD[span.start : span.stop], span.before
    return (own if first == last else torch.cat((x_NKD[first:last], own))).transpose(0, 1)


def _work(spans: Sequence[Span]) -> Iterator[tuple[Span, list[tuple[int, int, int]]]]:
    """Each document with the (first query, one behind the last, keys they see) of its blocks."""
    for span in spans:
        earlier = span.before[1] - span.before[0]
        pieces = _blocks(span.stop - span.start)
        yield span, [(span.start + a, span.start + b, earlier + b) for a, b in pieces]


class _SpanAttention(torch.autograd.Function):
    """(q (N, H, D), k (N, K, D), v (N, K, D), spans, scale) -> (N, H, D); zeros outside the spans."""

    @staticmethod
    def forward(ctx: Any, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, spans: Sequence[Span], scale: float) -> Tensor:
        mixed_NHD, kept = _mix(q_NHD, k_NKD, v_NKD, spans, scale)
        ctx.save_for_backward(q_NHD, k_NKD, v_NKD, *kept)
        ctx.spans, ctx.scale = spans, scale
        return mixed_NHD

    @staticmethod
    def backward(ctx: Any, grad_NHD: Tensor) -> tuple[Tensor | None, ...]:
        q_NHD, k_NKD, v_NKD, *kept = ctx.saved_tensors
        spans, scale = ctx.spans, ctx.scale
        if torch.is_grad_enabled():
            # A gradient of this gradient is wanted: go through operations that have one.
            wanted = (q_NHD, k_NKD, v_NKD)
            found = torch.autograd.grad(_plain(*wanted, spans, scale), wanted, grad_NHD, create_graph=True)
            return (*found, None, None)
        grad_q, grad_k, grad_v = torch.zeros_like(q_NHD), torch.zeros_like(k_NKD), torch.zeros_like(v_NKD)
        K, at, nothing = k_NKD.shape[1], 0, q_NHD.new_zeros(())
        for span, blocks in _work(spans):
            k_KSD, v_KSD = _seen(k_NKD, span), _seen(v_NKD, span)
            k_pull = v_pull = nothing
            for number in reversed(range(len(blocks))):  # the last block sees all keys
                (start, stop, seen), weights_KRS = blocks[number], kept[at + number]
                q_KRD, own_KRD = _stacked(q_NHD, start, stop, K), _stacked(grad_NHD, start, stop, K)
                pull_KRS = torch.bmm(own_KRD, v_KSD[:, :seen].transpose(1, 2))
                pull_KRS = torch._softmax_backward_data(pull_KRS, weights_KRS, -1, weights_KRS.dtype)
                _put(grad_q, start, stop, torch.baddbmm(nothing, pull_KRS, k_KSD[:, :seen], beta=0, alpha=scale))
                own_k = torch.baddbmm(nothing, pull_KRS.transpose(1, 2), q_KRD, beta=0, alpha=scale)
                own_v = torch.bmm(weights_KRS.transpose(1, 2), own_KRD)
                if number == len(blocks) - 1:
                    k_pull, v_pull = own_k, own_v
                else:
                    k_pull[:, :seen] += own_k
                    v_pull[:, :seen] += own_v
            at += len(blocks)
            first, last = span.before
            for grad, pull_KSD in ((grad_k, k_pull), (grad_v, v_pull)):
                grad[span.start : span.stop] += pull_KSD[:, last - first :].transpose(0, 1)
                if last > first:
                    grad[first:last] += pull_KSD[:, : last - first].transpose(0, 1)
        return grad_q, grad_k, grad_v, None, None


def _mix(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, spans: Sequence[Span], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Mixed values, and the attention weights of every block."""
    mixed_NHD, kept, hidden = torch.zeros_like(q_NHD), [], _hidden(q_NHD.dtype)
    K, G = k_NKD.shape[1], q_NHD.shape[1] // k_NKD.shape[1]
    for span, blocks in _work(spans):
        k_KSD, v_KSD = _seen(k_NKD, span), _seen(v_NKD, span)
        for start, stop, seen in blocks:
            rows = stop - start
            bias_RS = hidden[:rows, LONGEST + rows - seen : LONGEST + rows]
            if G > 1:
                bias_RS = bias_RS.repeat(G, 1)
            q_KRD = _stacked(q_NHD, start, stop, K)
            logits_KRS = torch.baddbmm(bias_RS, q_KRD, k_KSD[:, :seen].transpose(1, 2), alpha=scale)
            kept.append(torch.softmax(logits_KRS, -1))
            _put(mixed_NHD, start, stop, torch.bmm(kept[-1], v_KSD[:, :seen]))
    return mixed_NHD, kept


def _plain(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, spans: Sequence[Span], scale: float) -> Tensor:
    """The same by operations that can be differentiated any number of times."""
    pieces = [_alone(q_NHD, k_NKD, v_NKD, span, scale, math=True) for span in spans]
    return _joined(pieces, spans, q_NHD)


def _alone(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, span: Span, scale: float, *, math: bool) -> Tensor:
    """(L, H, D) of one document, by torch's attention or, with `math`, by plain products."""
    q_1HLD = q_NHD[span.start : span.stop].transpose(0, 1)[None]
    k_1KSD, v_1KSD = _seen(k_NKD, span)[None], _seen(v_NKD, span)[None]
    L, S, G = q_1HLD.shape[2], k_1KSD.shape[2], q_NHD.shape[1] // k_NKD.shape[1]
    if not math and S > L and L * S > LARGEST:
        return tiled_attention(q_1HLD, k_1KSD, v_1KSD, scale, MaskRule(S))[0].transpose(0, 1)
    seen_LS = None
    if math or S > L:
        seen_LS = torch.ones(L, S, dtype=torch.bool, device=q_NHD.device).tril(S - L)
    if math:
        k_1HSD, v_1HSD = (x.repeat_interleave(G, 1) for x in (k_1KSD, v_1KSD))
        logits_1HLS = (q_1HLD * scale @ k_1HSD.transpose(-1, -2)).masked_fill(~seen_LS, -torch.inf)  # type: ignore[operator]
        return (logits_1HLS.softmax(-1) @ v_1HSD)[0].transpose(0, 1)
    mixed_1HLD = F.scaled_dot_product_attention(
        q_1HLD, k_1KSD, v_1KSD, attn_mask=seen_LS, is_causal=seen_LS is None, scale=scale, enable_gqa=G > 1
    )
    return mixed_1HLD[0].transpose(0, 1)


class _Table(NamedTuple):
    """Where the tokens of tiny documents lie, padded to (M, L) queries and (M, S) keys.

    Attributes:
        query_ML, key_MS: places among the N tokens.
        bias_MLS: 0 where a query sees a key, else -inf.
        real: which of the M * L queries are no padding.
    """

    query_ML: Tensor
    key_MS: Tensor
    bias_MLS: Tensor
    real: Tensor


@lru_cache(maxsize=8)  # all layers of a step ask for the same
def _table(spans: tuple[Span, ...], dtype: torch.dtype) -> _Table:
    starts, stops = (torch.tensor([getattr(span, name) for span in spans]) for name in ("start", "stop"))
    first, last = torch.tensor([span.before for span in spans]).unbind(1)
    sizes, earlier = (stops - starts)[:, None], (last - first)[:, None]
    place_L, place_S = torch.arange(int(sizes.max())), torch.arange(max(span.keys for span in spans))
    query_ML = starts[:, None] + place_L.minimum(sizes - 1)
    own_MS = starts[:, None] + (place_S - earlier).clamp(min=0).minimum(sizes - 1)
    key_MS = torch.where(place_S < earlier, first[:, None] + place_S, own_MS)
    sees_ML1 = (earlier + place_L.minimum(sizes - 1))[:, :, None]
    bias_MLS = torch.zeros(*query_ML.shape, len(place_S), dtype=dtype).masked_fill(place_S > sees_ML1, -torch.inf)
    return _Table(query_ML, key_MS, bias_MLS, (place_L < sizes).flatten().nonzero()[:, 0])


def _together(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, spans: tuple[Span, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Places of tiny documents, and the mixed values there, by operations differentiable any number of times."""
    table = _table(spans, q_NHD.dtype)
    (M, L), S = table.query_ML.shape, table.key_MS.shape[1]
    (_, H, D), K = q_NHD.shape, k_NKD.shape[1]
    q = q_NHD.index_select(0, table.query_ML.flatten()).view(M, L, K, H // K, D).permute(0, 2, 3, 1, 4)
    k, v = (
        x.index_select(0, table.key_MS.flatten()).view(M, S, K, D).transpose(1, 2)[:, :, None] for x in (k_NKD, v_NKD)
    )
    logits = (q * scale).reshape(M, K, 1, -1, D) @ k.transpose(-1, -2)
    weights = (logits.view(M, K, H // K, L, S) + table.bias_MLS[:, None, None]).softmax(-1)
    mixed = (weights.view(M, K, 1, -1, S) @ v).view(M, K, H // K, L, D).permute(0, 3, 1, 2, 4).reshape(M * L, H, D)
    return table.query_ML.flatten().index_select(0, table.real), mixed.index_select(0, table.real)


def _joined(pieces: Sequence[Tensor], spans: Sequence[Span], like_NHD: Tensor) -> Tensor:
    """Pieces at their places, zeros between them."""
    parts, at = [], 0
    for piece, span in zip(pieces, spans, strict=True):
        if span.start > at:
            parts.append(like_NHD.new_zeros(span.start - at, *like_NHD.shape[1:]))
        parts.append(piece)
        at = span.stop
    if at < len(like_NHD):
        parts.append(like_NHD.new_zeros(len(like_NHD) - at, *like_NHD.shape[1:]))
    return torch.cat(parts)


def span_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float, spans: Sequence[Span]) -> Tensor:
    """`softmax(scale * q.k) v` where a query sees its own document up to itself, and all of the one it goes on from.

    Args:
        q_BHTD: queries; head h reads key head h // (H / K). float32 or float64, on the CPU.
        k_BKTD: keys.
        v_BKTD: values.
        scale: factor of the products.
        spans: the documents; see `resilin.models.spans.spans_of`.

    Returns:
        (B, H, T, D); 0 where no document is.
    """
    B, _, T, _ = q_BHTD.shape
    q_NHD, k_NKD, v_NKD = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTD, k_BKTD, v_BKTD))
    tiny = tuple(span for span in spans if span.keys <= _TINY)
    if len(tiny) < _FEW:
        tiny = ()
    short = tuple(span for span in spans if (_TINY if tiny else 0) < span.keys <= LONGEST)
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in (q_NHD, k_NKD, v_NKD))
    if not short:
        mixed_NHD = torch.zeros_like(q_NHD)
    elif differentiate:
        with nothing_kept():
            mixed_NHD = _SpanAttention.apply(q_NHD, k_NKD, v_NKD, short, scale)
    else:
        mixed_NHD = _mix(q_NHD, k_NKD, v_NKD, short, scale)[0]
    if tiny:
        places, values = _together(q_NHD, k_NKD, v_NKD, tiny, scale)
        mixed_NHD = mixed_NHD.index_copy(0, places, values)
    long = [span for span in spans if span.keys > LONGEST]
    if long:
        pieces = [_alone(q_NHD, k_NKD, v_NKD, span, scale, math=False) for span in long]
        mixed_NHD = mixed_NHD + _joined(pieces, long, mixed_NHD)
    return mixed_NHD.view(B, T, *mixed_NHD.shape[1:]).transpose(1, 2)
