"""Members of a pipeline in simulated time: what each result is for, what can be done, and when it would be."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from resilin.parallel.pipeline.errors import ScheduleError
from resilin.parallel.pipeline.messages import Part
from resilin.parallel.pipeline.schedule import Action, B, F, I, Kind, W
from resilin.parallel.pipeline.simulate import Costs, PerStage, each_stage
from resilin.parallel.pipeline.slots import SlotTable, Transfer, transfers
from resilin.parallel.pipeline.timeline import Record, Time


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One replica of one pipeline rank.

    Attributes:
        rank: of the pipeline.
        replica: of that rank, as its slot table numbers it.
    """

    rank: int
    replica: int


Cell: TypeAlias = tuple[int, int, int]
"""Member, stage, micro-batch."""


class Links:
    """Which parts of whose results go where."""

    def __init__(self, tables: tuple[SlotTable, ...], rank_of: tuple[int, ...], members: tuple[Member, ...]) -> None:
        if len({table.slots for table in tables}) > 1:
            raise ScheduleError(f"ranks have tables of different batches: {[table.slots for table in tables]} slots")
        number = {member: place for place, member in enumerate(members)}
        self._forward: dict[Cell, list[tuple[Part, int]]] = {}
        self._back: dict[Cell, list[tuple[Part, int]]] = {}
        known: dict[tuple[int, int], tuple[Transfer, ...]] = {}
        for stage in range(len(rank_of) - 1):
            for table, source, target in (
                (self._forward, stage, stage + 1),
                (self._back, stage + 1, stage),
            ):
                a, b = rank_of[source], rank_of[target]
                if (a, b) not in known:
                    known[a, b] = transfers(tables[a], tables[b])
                for one in known[a, b]:
                    sender, receiver = number[Member(a, one.sender)], number[Member(b, one.receiver)]
                    part = Part(source, target, one)
                    table.setdefault((sender, source, one.sender_micro), []).append((part, receiver))
        self._embedded: dict[Cell, list[tuple[Part, int]]] = {}
        first, last = rank_of[0], rank_of[-1]
        for one in transfers(tables[first], tables[last]):
            part = Part(0, len(rank_of) - 1, one, embedded=True)
            sender, receiver = number[Member(first, one.sender)], number[Member(last, one.receiver)]
            self._embedded.setdefault((sender, 0, one.sender_micro), []).append((part, receiver))

    def made(self, member: int, action: Action) -> list[tuple[Part, int]]:
        """(part, receiving member) of what an action has for a neighbouring stage."""
        if action.kind is W:
            return []
        table = self._forward if action.kind is F else self._back
        return table.get((member, action.stage, action.micro), [])

    def embedded(self, member: int, action: Action) -> list[tuple[Part, int]]:
        """(part, receiving member) of what a backward of the first stage has for the last one, where they are tied."""
        if action.kind not in (B, I):
            return []
        return self._embedded.get((member, action.stage, action.micro), [])

    def awaited(self) -> tuple[dict[Cell, int], dict[Cell, int]]:
        """How many parts each forward and each backward waits for."""
        counts: tuple[dict[Cell, int], dict[Cell, int]] = {}, {}
        for table, into in zip((self._forward, self._back), counts, strict=True):
            for parts in table.values():
                for part, receiver in parts:
                    cell = receiver, part.target, part.rows.receiver_micro
                    into[cell] = into.get(cell, 0) + 1
        return counts


class MemberRun:
    """Members that compute as soon as what they choose can be done, in simulated time."""

    def __init__(
        self,
        tables: tuple[SlotTable, ...],
        rank_of: tuple[int, ...],
        members: tuple[Member, ...],
        costs: Costs,
        transfer: PerStage,
    ) -> None:
        self._members = members
        self.links = Links(tables, rank_of, members)
        self._lacks = self.links.awaited()
        micros = [tables[member.rank].micros(member.replica) for member in members]
        self.sizes = [[sum(end - start for start, end in micro) for micro in mine] for mine in micros]
        self.first = [[micro[0][0] for micro in mine] for mine in micros]
        if costs.micro:
            raise ScheduleError("a member's micro-batch takes what its slots take: leave costs.micro out")
        compute = costs.compute(len(rank_of), 1)
        self._per_slot = {(k, s): compute(Action(k, s, 0)) for k in Kind for s in range(len(rank_of))}
        between = each_stage("transfer", transfer, len(rank_of) - 1)
        self._hop = [time if rank_of[s] != rank_of[s + 1] else 0 for s, time in enumerate(between)]
        self._forwarded: set[Cell] = set()
        self._backed: set[Cell] = set()
        # What can be done at members with one stage, in the order in which it could be: micro-batches.
        self.fronts: list[dict[int, None]] = [{} for _ in members]
        self.backs: list[dict[int, None]] = [{} for _ in members]
        for number, member in enumerate(members):
            for micro in range(len(micros[number])):
                self._note((number, rank_of.index(member.rank), micro))
        self.records: list[Record] = []

    def can(self, member: int, action: Action) -> bool:
        """Whether all that an action uses is there."""
        cell = member, action.stage, action.micro
        if action.kind is F:
            return not self._lacks[0].get(cell)
        if action.kind is W:
            return cell in self._backed
        return cell in self._forwarded and not self._lacks[1].get(cell)

    def go(self, choose: Callable[[int], Action | None], unlock: Callable[[], tuple[int, Action] | None]) -> None:
        """Lets everybody do what `choose` gives for a free member, until nobody can; then once what `unlock` gives."""
        events: list[tuple[Time, int, int, Action | Part]] = []  # what ends, or arrives, at whom; in order of beginning
        count = 0
        free, asked = [True] * len(self._members), set(range(len(self._members)))
        now: Time = 0

        def begin(member: int, action: Action) -> None:
            nonlocal count
            end = now + self._per_slot[action.kind, action.stage] * self.sizes[member][action.micro]
            self.records.append(Record(action, member, now, end))
            free[member] = False
            (self.fronts if action.kind is F else self.backs)[member].pop(action.micro, None)
            count += 1
            heapq.heappush(events, (end, count, member, action))

        while True:
            for member in sorted(asked):
                action = choose(member) if free[member] else None
                if action is not None:
                    begin(member, action)
            asked.clear()
            if not events:
                forced = unlock()
                if forced is None:
                    return
                begin(*forced)
            now = events[0][0]
            while events and events[0][0] == now:
                _, _, member, event = heapq.heappop(events)
                asked.add(member)
                if isinstance(event, Part):
                    self._arrive(member, event)
                    continue
                free[member] = True
                self._finish(member, event)
                for part, receiver in self.links.made(member, event):
                    hop = self._hop[min(part.source, part.target)]
                    if hop:
                        count += 1
                        heapq.heappush(events, (now + hop, count, receiver, part))
                    else:
                        self._arrive(receiver, part)
                        asked.add(receiver)

    def _finish(self, member: int, action: Action) -> None:
        cell = member, action.stage, action.micro
        if action.kind is F:
            self._forwarded.add(cell)
        elif action.kind in (B, I):
            self._backed.add(cell)
        self._note(cell)

    def _arrive(self, member: int, part: Part) -> None:
        cell = member, part.target, part.rows.receiver_micro
        self._lacks[not part.forward][cell] -= 1
        self._note(cell)

    def _note(self, cell: Cell) -> None:
        member, _, micro = cell
        if cell not in self._forwarded:
            if not self._lacks[0].get(cell):
                self.fronts[member][micro] = None
        elif cell not in self._backed and not self._lacks[1].get(cell):
            self.backs[member][micro] = None
