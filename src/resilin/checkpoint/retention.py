"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Collection


def superfluous(steps: Collection[int], keep_last: int, keep_every: int, newest: int | None = None) -> list[int]:
    """The steps whose checkpoints can go, ascending.

    Args:
        steps: that there are.
        keep_last: how many of the newest stay; 0: all.
        keep_every: those of steps divisible by this stay besides; 0: none.
        newest: the one that was saved last, where that is not the largest (a run that went back); it stays.
    """
    if not keep_last:
        return []
    others = sorted(step for step in steps if step != newest)
    count = keep_last - (newest is not None)
    keep = set(others[-count:]) if count else set()
    if keep_every:
        keep.update(step for step in others if step % keep_every == 0)
    return [step for step in others if step not in keep]
