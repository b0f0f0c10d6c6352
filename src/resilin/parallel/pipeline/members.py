"""Schedules for stages with unlike numbers of replicas: an order for every member, whoever owns which slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.member_run import Links, Member, MemberRun
from resilin.parallel.pipeline.messages import Op, Receive, Send
from resilin.parallel.pipeline.schedule import Action, B, F, Schedule
from resilin.parallel.pipeline.simulate import Costs, PerStage
from resilin.parallel.pipeline.slots import SlotTable, transfers
from resilin.parallel.pipeline.timeline import Time, Timeline


@dataclass(frozen=True, slots=True)
class MemberSchedule:
    """The order in which every member computes.

    Attributes:
        tables: for each pipeline rank, who owns which slots.
        rank_of: for each stage, the rank that holds it.
        members: all of them, by rank and replica; their places here are their numbers.
        actions: for each member, in order; an action's micro-batch is one of the member's own.
    """

    tables: tuple[SlotTable, ...]
    rank_of: tuple[int, ...]
    members: tuple[Member, ...]
    actions: tuple[tuple[Action, ...], ...]

    def rows(self, member: int, micro: int) -> int:
        """How many slots a member's micro-batch has."""
        one = self.members[member]
        return sum(end - start for start, end in self.tables[one.rank].micros(one.replica)[micro])


def follow(schedule: Schedule, tables: Sequence[SlotTable]) -> MemberSchedule:
    """A schedule of any method for replicas that keep in step: each member does what its rank does.

    Args:
        schedule: of ranks.
        tables: for each rank, with as many micro-batches for each replica as the schedule has, the same slots in the
            same one at every rank; `in_turns`, also after `without(..., "reshape")`.

    Raises:
        ScheduleError: tables that do not keep in step.
    """
    if len(tables) != schedule.ranks:
        raise ScheduleError(f"{len(tables)} slot tables are given for {schedule.ranks} ranks")
    for rank, table in enumerate(tables):
        for replica in table.replicas:
            if len(table.micros(replica)) != schedule.micros:
                raise ScheduleError(
                    f"rank {rank}, replica {replica} has {len(table.micros(replica))} micro-batches, the schedule "
                    f"{schedule.micros}: replicas that do not keep in step need an order of their own (`level`)"
                )
        for one in transfers(tables[0], table):
            if one.sender_micro != one.receiver_micro:
                raise ScheduleError(
                    f"slot {one.start} is in micro-batch {one.sender_micro} at rank 0, but in {one.receiver_micro} at "
                    f"rank {rank}: they do not keep in step (`level` finds an order for any tables)"
                )
    members = _members(tables)
    actions = tuple(schedule.actions[member.rank] for member in members)
    return MemberSchedule(tuple(tables), schedule.rank_of, members, actions)


def level(tables: Sequence[SlotTable], costs: Costs | None = None, more: int = 0) -> MemberSchedule:
    """1F1B for any ownership: one stage a rank, each replica with any micro-batches of any slots.

    A member does a backward whenever one can be done, else a forward, as long as rank `r` of `p` holds fewer than
    `p - r` micro-batches; of several forwards the one whose next owner has been given the least. With equal replicas
    that is 1F1B itself. The order is found by doing it in a simulation, so it can be run. Where ownership is so unlike
    that all would wait for each other, the member with the lowest slot goes beyond its limit.

    Args:
        tables: for each rank, of one batch.
        costs: of the simulation, for one slot.
        more: micro-batches that each may hold beyond `p - r`. After a loss, one or two take most of the waiting away
            that comes from a rank's fewer replicas holding fewer micro-batches together.

    Raises:
        ScheduleError: tables of batches of different sizes, or `more` is negative.
    """
    if more < 0:
        raise ScheduleError(f"members cannot hold {more} micro-batches more: use 0 or more")
    ranks = len(tables)
    members = _members(tables)
    run = MemberRun(tuple(tables), tuple(range(ranks)), members, costs or Costs(), 0)
    orders: list[list[Action]] = [[] for _ in members]
    held = [0] * len(members)
    fed = [0] * len(members)  # slots that were begun for each

    def forward(member: int) -> Action:
        """Of those that can be done, the one whose next owner has been given the least; then what came first."""
        rank = members[member].rank
        able = (Action(F, rank, micro) for micro in run.fronts[member])
        return min(able, key=lambda one: max((fed[to] for _, to in run.links.made(member, one)), default=0))

    def take(member: int, action: Action) -> Action:
        held[member] += 1 if action.kind is F else -1
        if action.kind is F:
            for part, receiver in run.links.made(member, action):
                fed[receiver] += part.rows.rows
        orders[member].append(action)
        return action

    def choose(member: int) -> Action | None:
        if run.backs[member]:
            return take(member, Action(B, members[member].rank, next(iter(run.backs[member]))))
        if run.fronts[member] and held[member] < ranks - members[member].rank + more:
            return take(member, forward(member))
        return None

    def unlock() -> tuple[int, Action] | None:
        able = [(run.first[member][micro], member) for member, fronts in enumerate(run.fronts) for micro in fronts]
        if not able:
            return None
        _, member = min(able)
        return member, take(member, forward(member))

    run.go(choose, unlock)
    return MemberSchedule(tuple(tables), tuple(range(ranks)), members, tuple(map(tuple, orders)))


def simulate_members(schedule: MemberSchedule, costs: Costs | None = None, transfer: PerStage = 0) -> Timeline:
    """When each action runs if every member does its own as soon as it can; the timeline's ranks are members' numbers.

    Args:
        schedule: of members.
        costs: of one slot; a micro-batch takes as many times that as it has slots.
        transfer: from stage `s` to `s + 1`, and back, between two ranks; for any number of rows.

    Raises:
        ScheduleError: costs do not fit, or members wait for each other for ever: who, and at what.
    """
    run = MemberRun(schedule.tables, schedule.rank_of, schedule.members, costs or Costs(), transfer)
    at = [0] * len(schedule.members)

    def choose(member: int) -> Action | None:
        row = schedule.actions[member]
        if at[member] == len(row) or not run.can(member, row[at[member]]):
            return None
        at[member] += 1
        return row[at[member] - 1]

    run.go(choose, lambda: None)
    left = [number for number, row in enumerate(schedule.actions) if at[number] < len(row)]
    if left:
        said = "; ".join(
            f"rank {schedule.members[n].rank}, replica {schedule.members[n].replica} at {schedule.actions[n][at[n]]}"
            for n in left
        )
        raise ScheduleError(f"the schedule deadlocks: members wait for each other: {said}")
    return Timeline(tuple(run.records), len(schedule.members))


def lower_members(
    schedule: MemberSchedule, costs: Costs | None = None, transfer: PerStage = 0, *, tied: bool = False
) -> tuple[tuple[Op, ...], ...]:
    """Each member's actions with its sends and receives of rows between them; peers are members' numbers.

    All are cut from one common order, as `lower` does it, a message's parts ascending by slot. So they run to their
    end however strictly they are done, and `check_rendezvous` passes.

    Args:
        schedule: of members.
        costs: as for `simulate_members`, like what follows.
        transfer: between stages.
        tied: whether the first stage's gradients of the embedding's output go to the last stage.

    Raises:
        ScheduleError: as `simulate_members` does.
    """
    timeline = simulate_members(schedule, costs, transfer)
    links = Links(schedule.tables, schedule.rank_of, schedule.members)
    events: list[tuple[tuple[Time, bool, int, bool], int, Action]] = []
    for position, record in enumerate(timeline.records):
        instant = record.end == record.start
        events.append(((record.start, True, position, False), record.rank, record.action))
        events.append(((record.end, instant, position, True), record.rank, record.action))
    rows: list[list[Op]] = [[] for _ in schedule.members]
    for key, member, action in sorted(events, key=lambda event: event[0]):
        if not key[3]:
            rows[member].append(action)
            continue
        for part, receiver in links.made(member, action) + (links.embedded(member, action) if tied else []):
            if receiver != member:  # stages of one rank share its table, so what stays on a rank stays on a member
                rows[member].append(Send(part, receiver))
                rows[receiver].append(Receive(part, member))
    return tuple(map(tuple, rows))


def _members(tables: Sequence[SlotTable]) -> tuple[Member, ...]:
    return tuple(Member(rank, replica) for rank, table in enumerate(tables) for replica in table.replicas)
