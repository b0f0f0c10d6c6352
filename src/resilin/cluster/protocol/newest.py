"""Of the copies that are left, the newest version that is there in whole. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from resilin.cluster.view import View

Copies = Sequence[tuple[int, int, Sequence[int]]]
"""(owner, epoch, versions) of all copies in a member's memory."""


def holding(owner: int, epoch: int, copies: Mapping[int, Copies]) -> dict[int, set[int]]:
    """By version the members that have a copy of an owner's states, made under the view of an epoch.

    Args:
        owner: whose states.
        epoch: of the view.
        copies: by member what it has.
    """
    found: dict[int, set[int]] = {}
    for member, listed in copies.items():
        for who, when, versions in listed:
            if (who, when) == (owner, epoch):
                for version in versions:
                    found.setdefault(version, set()).add(member)
    return found


def newest_whole(views: Sequence[View], copies: Mapping[int, Copies]) -> tuple[View, int, dict[int, int]] | None:
    """The version, the view it was copied under, and by owner the member that its part is read from.

    Args:
        views: those whose copies may be there; of equal versions the first is taken.
        copies: by member what it has.

    Returns:
        None where no version is there in whole.
    """
    best: tuple[View, int, dict[int, int]] | None = None
    for view in views:
        held = {owner: holding(owner, view.epoch, copies) for owner in view.members}
        common = set.intersection(*(set(versions) for versions in held.values()))
        if common and (best is None or max(common) > best[1]):
            version = max(common)
            where = {
                owner: owner if owner in versions[version] else min(versions[version])
                for owner, versions in held.items()
            }
            best = view, version, where
    return best
