"""From one view to the next: members that are lost, that leave, and that come. Pure.

What stays does not move: survivors keep their stage and all their shards but for the surplus that a newcomer takes
(`resilin.layout.dealing.redeal`), so a loss moves only what the lost member owned (ElasWave, section 6).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from resilin.cluster.view import Stage, View
from resilin.layout.dealing import VIRTUAL_SHARDS, deal, redeal


class NobodyLeftError(RuntimeError):
    """Fewer members than stages are left."""


def first_view(
    members: Sequence[int], hosts: Mapping[int, str], stages: int = 1, layers: Sequence[int] = (), copies: int = 1
) -> View:
    """The view that a run begins with: stages get near-equal runs of the members.

    Args:
        members: numbers, in order.
        hosts: by member.
        stages: of the pipeline.
        layers: see `View`.
        copies: see `View`.

    Raises:
        NobodyLeftError: there are fewer members than stages.
    """
    if len(members) < stages:
        raise NobodyLeftError(f"{len(members)} workers cannot hold {stages} pipeline stages: start {stages} or more")
    base, more = divmod(len(members), stages)
    made, first = [], 0
    for stage in range(stages):
        mine = tuple(members[first : first + base + (stage < more)])
        first += len(mine)
        made.append(Stage(mine, tuple(mine[owner] for owner in deal(VIRTUAL_SHARDS, len(mine)))))
    return View(0, tuple(made), {number: hosts[number] for number in members}, tuple(layers), copies)


def changed(view: View, gone: Collection[int] = (), come: Mapping[int, str] | None = None) -> View:
    """The next view.

    Args:
        view: the last one.
        gone: members that take no part any more.
        come: by number the hosts of new ones.

    Raises:
        NobodyLeftError: fewer members than stages would be left.
    """
    come = dict(come or {})
    lists = [[number for number in stage.members if number not in gone] for stage in view.stages]
    hosts = {number: host for number, host in view.hosts.items() if number not in gone} | come
    if len(hosts) < len(lists):
        raise NobodyLeftError(
            f"{len(hosts)} of {len(view.members)} members are left, and the model has {len(lists)} pipeline stages: "
            "each needs one at least"
        )
    for number in sorted(come):
        min(lists, key=len).append(number)
    for stage in lists:
        if not stage:  # its last member is lost: one of the stage that has most moves here
            stage.append(max(lists, key=len).pop())
    stages = tuple(
        Stage(tuple(members), _owners(view.stages[place].shards, members)) for place, members in enumerate(lists)
    )
    return View(view.epoch + 1, stages, hosts, view.layers, view.copies)


def moved(view: View) -> View:
    """The same members in stages of near-equal numbers, with as few as possible in another one than before."""
    lists = [list(stage.members) for stage in view.stages]
    while len(most := max(lists, key=len)) - len(least := min(lists, key=len)) > 1:
        least.append(most.pop())
    stages = tuple(
        Stage(tuple(members), _owners(view.stages[place].shards, members)) for place, members in enumerate(lists)
    )
    return replace(view, stages=stages)


def _owners(shards: Iterable[int], members: Sequence[int]) -> tuple[int, ...]:
    place = {number: index for index, number in enumerate(members)}
    return tuple(members[owner] for owner in redeal([place.get(number) for number in shards], len(members)))
