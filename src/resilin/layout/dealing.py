"""Tables of owners for virtual shards: fair, and changed as little as can be when owners come and go."""

from __future__ import annotations

from collections.abc import Sequence

from resilin.layout.errors import LayoutError

ALIGN = 16
"""Elements at whose multiples virtual shards begin: an update is then the same to the bit, however they are owned."""
VIRTUAL_SHARDS = 64
"""Into how many a parameter is cut. It decides the order in which a norm is added, so it does not follow the ranks."""


def virtual_shards(owners: int) -> int:
    """Into how many shards a parameter is cut for so many owners: the same number as long as it is enough."""
    return VIRTUAL_SHARDS if owners <= VIRTUAL_SHARDS else 4 * owners


def deal(shards: int, owners: int) -> tuple[int, ...]:
    """Shards in equal runs, as far as they divide: neighbours in a tensor have one owner.

    Args:
        shards: how many.
        owners: how many; numbered from 0.

    Returns:
        (shards,) the owner of each.
    """
    if owners < 1 or shards < 1:
        raise LayoutError(f"{shards} shards cannot be dealt to {owners} owners")
    base, more = divmod(shards, owners)
    return tuple(owner for owner in range(owners) for _ in range(base + (owner < more)))


def redeal(table: Sequence[int | None], owners: int) -> tuple[int, ...]:
    """A fair table with the fewest shards changing hands.

    Everyone ends with the same number of shards, or one more. Who has more than that gives the surplus away; nobody
    else loses any. So a lost owner costs its own shards, and a new one just its share.

    Args:
        table: (shards,) the owner of each; None, or a number that is not below `owners`: its owner is gone.
        owners: how many there are now.
    """
    if owners < 1 or not table:
        raise LayoutError(f"{len(table)} shards cannot be dealt to {owners} owners")
    have: list[list[int]] = [[] for _ in range(owners)]
    free: list[int] = []
    for shard, owner in enumerate(table):
        (free if owner is None or not 0 <= owner < owners else have[owner]).append(shard)
    base, more = divmod(len(table), owners)
    # The larger shares go to those who have most, so that they give away least.
    richest = sorted(range(owners), key=lambda owner: (-len(have[owner]), owner))
    quota = {owner: base + (rank < more) for rank, owner in enumerate(richest)}
    for owner in range(owners):
        free += have[owner][quota[owner] :]
        have[owner] = have[owner][: quota[owner]]
    free.sort(reverse=True)
    dealt = [0] * len(table)
    for owner in range(owners):
        have[owner] += [free.pop() for _ in range(quota[owner] - len(have[owner]))]
        for shard in have[owner]:
            dealt[shard] = owner
    return tuple(dealt)
