"""CoLM-Air's attention: query heads of every chain read the keys and values of the first.

Each chain's query heads are shared out to all key heads alike, as in an ordinary decoder of that chain alone: of a
chain with m * K heads, head j reads key head j // m. (The paper repeats the key heads: head j reads j % K. With one
head to a key head, m = 1, both are the same; else the heads have other numbers, and the first chain is an ordinary
grouped-query decoder here.) Attention itself wants query heads that share a key head side by side.

Shapes: B batch, T tokens, H query heads of a scale, K key heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def by_key_head(q_BTHD: Tensor, sizes: tuple[int, ...], key_heads: int) -> Tensor:
    """Query heads chain by chain -> in the order of the key heads they read.

    Args:
        q_BTHD: of some first chains.
        sizes: query heads of each of these chains.
        key_heads: K, which divides each size.
    """
    if len(sizes) == 1:
        return q_BTHD
    B, T, H, D = q_BTHD.shape
    parts = [part.unflatten(2, (key_heads, -1)) for part in q_BTHD.split(sizes, 2)]
    return torch.cat(parts, 3).view(B, T, H, D)


def by_chain(mixed_BTHD: Tensor, sizes: tuple[int, ...], key_heads: int) -> Tensor:
    """The other way."""
    if len(sizes) == 1:
        return mixed_BTHD
    grouped = mixed_BTHD.unflatten(2, (key_heads, -1))
    return torch.cat([part.flatten(2, 3) for part in grouped.split([n // key_heads for n in sizes], 3)], 2)
