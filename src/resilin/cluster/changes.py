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
    members: Sequence[int],
    hosts: Mapping[int, str],
    stages: int = 1,
    layers: Sequence[int] = (),
    copies: int = 1,
    tensor: int = 1,
    expert: int = 1,
    experts: int = 0,
) -> View:
    """The view that a run begins with: stages get near-equal runs of the members, or of teams of them.

    Args:
        members: numbers, in order; who is in no whole team has no place.
        hosts: by member.
        stages: of the pipeline.
        layers: see `View`.
        copies: see `View`.
        tensor: members of a team.
        expert: see `View`.
        experts: of a layer; 0: a run without expert parallelism.

    Raises:
        NobodyLeftError: there are fewer members, or teams, than stages.
    """
    teams = _teams(members, hosts, tensor)
    if len(teams) < stages:
        raise NobodyLeftError(
            f"{len(members)} workers cannot hold {stages} pipeline stages{_of_teams(tensor)}: start {stages * tensor} "
            "or more"
        )
    base, more = divmod(len(teams), stages)
    made, first = [], 0
    for stage in range(stages):
        mine = teams[first : first + base + (stage < more)]
        first += len(mine)
        owners = deal(VIRTUAL_SHARDS, len(mine))
        new = Stage(sum(mine, ()), tuple(mine[owner][0] for owner in owners), tensor)
        made.append(_with_experts(new, None, expert, experts))
    known = {number: hosts[number] for team in teams for number in team}
    return View(0, tuple(made), known, tuple(layers), copies, expert)


def changed(view: View, gone: Collection[int] = (), come: Mapping[int, str] | None = None) -> View:
    """The next view.

    Whoever's team has lost a member computes no more until there is another team: of those that are left over so, and
    of new ones.

    Args:
        view: the last one.
        gone: members that take no part any more.
        come: by number the hosts of new ones.

    Raises:
        NobodyLeftError: fewer members, or teams, than stages would be left.
    """
    come = dict(come or {})
    lists = [[team for team in stage.teams if not set(gone) & set(team)] for stage in view.stages]
    hosts = {number: host for number, host in view.hosts.items() if number not in gone} | come
    whole = {number for teams in lists for team in teams for number in team}
    parts = {n: part for stage in view.stages for team in stage.teams for part, n in enumerate(team)}
    fresh = _teams([number for number in sorted(hosts) if number not in whole], hosts, view.tensor, parts)
    if sum(map(len, lists)) + len(fresh) < len(lists):
        raise NobodyLeftError(
            f"{len(hosts)} of {len(view.members)} members are left, and the model has {len(lists)} pipeline stages"
            f"{_of_teams(view.tensor)}: each needs one at least"
        )
    for team in fresh:
        min(lists, key=len).append(team)
    for stage in lists:
        if not stage:  # its last member is lost: one of the stage that has most moves here
            stage.append(max(lists, key=len).pop())
    known = {number: hosts[number] for teams in lists for team in teams for number in team}
    return View(view.epoch + 1, _restaged(view, lists), known, view.layers, view.copies, view.expert)


def moved(view: View) -> View:
    """The same members in stages of near-equal numbers, with as few as possible in another one than before."""
    lists = [list(stage.teams) for stage in view.stages]
    while len(most := max(lists, key=len)) - len(least := min(lists, key=len)) > 1:
        least.append(most.pop())
    return replace(view, stages=_restaged(view, lists))


def sharing_of(teams: int, expert: int) -> int:
    """How many of so many teams have one set of experts between them: `expert` at least, or all.

    Every set has equally many.
    """
    return next(size for size in range(min(expert, teams), teams + 1) if not teams % size)


def gaining(before: View, after: View) -> list[int]:
    """Members that are about to have blocks, experts, or shards of states, which they do not have now.

    Args:
        before: the view that is.
        after: the one to be.
    """
    return [member for member in after.members if member in before.hosts and _gains(member, before, after)]


def _gains(member: int, before: View, after: View) -> bool:
    at = after.stage_of(member)
    if before.stage_of(member) != at:
        return True
    old, new = before.stages[at], after.stages[at]
    had, has = ({*range(*view.layers[at : at + 2] or (0,))} for view in (before, after))
    lead = after.team_of(member)[0]
    owned = [{shard for shard, owner in enumerate(stage.shards) if owner == lead} for stage in (old, new)]
    return not (has <= had and owned[1] <= owned[0] and {*new.experts_with(member)} <= {*old.experts_with(member)})


def _restaged(view: View, lists: Sequence[Sequence[tuple[int, ...]]]) -> tuple[Stage, ...]:
    """Stages of these teams, in which shards stay with whoever has them as far as that is fair."""
    made = []
    for stage, teams in zip(view.stages, lists, strict=True):
        new = Stage(sum(teams, ()), _owners(stage.shards, [team[0] for team in teams]), view.tensor)
        made.append(_with_experts(new, stage, view.expert, len(stage.experts)))
    return tuple(made)


def _with_experts(stage: Stage, before: Stage | None, expert: int, experts: int) -> Stage:
    """A stage whose teams have its experts between them. Of teams that all share one set as few move as can.

    Args:
        stage: its members.
        before: what it was.
        expert: so many teams, at least, are to share a set.
        experts: of a layer.
    """
    if not experts:
        return stage
    teams = len(stage.teams)
    sharing = sharing_of(teams, expert)
    table = deal(experts, sharing)
    if before is not None and sharing == teams and before.sharing == len(before.teams):
        place = {lead: index for index, lead in enumerate(stage.leads)}
        table = redeal([place.get(before.leads[owner]) for owner in before.experts], sharing)
    return replace(stage, sharing=sharing, experts=table)


def _owners(shards: Iterable[int], members: Sequence[int]) -> tuple[int, ...]:
    place = {number: index for index, number in enumerate(members)}
    return tuple(members[owner] for owner in redeal([place.get(number) for number in shards], len(members)))


def _teams(
    members: Sequence[int], hosts: Mapping[int, str], size: int, parts: Mapping[int, int] | None = None
) -> list[tuple[int, ...]]:
    """Members in teams, on one machine each where that can be; fewer than a team are left over.

    Args:
        members: in order.
        hosts: by member.
        size: of a team.
        parts: that members have had in other teams, and keep where that can be.
    """
    if size == 1:
        return [(number,) for number in members]
    by_host: dict[str, list[int]] = {}
    for number in members:
        by_host.setdefault(hosts[number], []).append(number)
    together, left = [], []
    for numbers in by_host.values():
        whole = len(numbers) // size * size
        together += [numbers[first : first + size] for first in range(0, whole, size)]
        left += numbers[whole:]
    left.sort(key=members.index)
    together += [left[first : first + size] for first in range(0, len(left) // size * size, size)]
    return sorted((_in_order(team, parts or {}) for team in together), key=lambda team: members.index(team[0]))


def _in_order(team: Sequence[int], parts: Mapping[int, int]) -> tuple[int, ...]:
    found: dict[int, int] = {}
    for number in team:
        if (part := parts.get(number, -1)) >= 0:
            found.setdefault(part, number)
    others = iter([number for number in team if number not in found.values()])
    return tuple(found[part] if part in found else next(others) for part in range(len(team)))


def _of_teams(tensor: int) -> str:
    return f" of teams of {tensor} (parallel.tensor)" if tensor > 1 else ""
