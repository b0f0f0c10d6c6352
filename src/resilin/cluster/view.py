"""Who takes part in a run, and who does and keeps what: the one value that every change of an elastic run replaces.

A view is decided in one place, numbered by its epoch and compared by all before anyone uses it (ElasWave, section 9).
Members are processes: a number is given once and never again, so that whoever was declared dead and comes back, or
speaks late, is a stranger. Pure.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any


class ViewError(ValueError):
    """A view contradicts itself."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The members that hold one stage of the model, each in whole or, with tensor parallelism, each team of them.

    Attributes:
        members: their numbers, team by team; micro-batches are dealt to the teams in this order.
        shards: (V,) the number of the member that owns each virtual shard of this stage's optimizer states; of a team
            that of its first member, each of whom owns that shard of its own part.
        tensor: members of a team, each of which has a part of every matrix.
        sharing: teams, neighbours, that have one set of experts between them; it divides the number of teams.
        experts: (E,) by expert of a layer the place, among those teams, of the one that has it; (): a run without
            expert parallelism.
    """

    members: tuple[int, ...]
    shards: tuple[int, ...]
    tensor: int = 1
    sharing: int = 1
    experts: tuple[int, ...] = ()

    @property
    def teams(self) -> tuple[tuple[int, ...], ...]:
        """The members that compute the same micro-batches together, in the order of their parts of matrices."""
        size = self.tensor
        return tuple(self.members[first : first + size] for first in range(0, len(self.members), size))

    @property
    def leads(self) -> tuple[int, ...]:
        """The first member of each team."""
        return self.members[:: self.tensor]

    @property
    def owners(self) -> tuple[int, ...]:
        """(V,) the owners as places in `teams`."""
        place = {number: index for index, number in enumerate(self.leads)}
        return tuple(place[number] for number in self.shards)

    def part(self, part: int) -> tuple[int, ...]:
        """Of each team the member that has this part of every matrix."""
        return self.members[part :: self.tensor]

    def with_experts(self, part: int, place: int) -> tuple[int, ...]:
        """Of the members with this part of every matrix those that have the experts of a place."""
        return self.part(part)[place :: self.sharing]

    def experts_of(self, place: int) -> tuple[int, ...]:
        """The experts of a place, ascending."""
        return tuple(expert for expert, owner in enumerate(self.experts) if owner == place)

    def experts_with(self, member: int) -> tuple[int, ...]:
        """The experts of a member, ascending."""
        return self.experts_of(self.members.index(member) // self.tensor % self.sharing)


@dataclass(frozen=True)
class View:
    """A run's members at one time.

    Attributes:
        epoch: how many changes there were.
        stages: of the pipeline; one, where the model is not divided.
        hosts: by member the machine it is on.
        layers: (stages + 1,) the first block of each stage, and one past the last; () where nothing is divided.
        copies: of every member's states in others' memory.
        expert: teams of a stage that are to have one set of experts between them: so many at least, if there are.
    """

    epoch: int
    stages: tuple[Stage, ...]
    hosts: Mapping[int, str]
    layers: tuple[int, ...] = ()
    copies: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        counts = Counter(number for stage in self.stages for number in stage.members)
        if twice := [number for number, count in counts.items() if count > 1]:
            raise ViewError(f"epoch {self.epoch}: member {twice[0]} is in two places")
        if set(counts) != set(self.hosts):
            raise ViewError(f"epoch {self.epoch}: hosts are known of {sorted(self.hosts)}, members are {self.members}")
        for number, stage in enumerate(self.stages):
            if not stage.members:
                raise ViewError(f"epoch {self.epoch}: nobody holds stage {number}")
            if stage.tensor != self.tensor or len(stage.members) % stage.tensor:
                raise ViewError(
                    f"epoch {self.epoch}: the {len(stage.members)} members of stage {number} are no teams of "
                    f"{self.tensor}"
                )
            if strangers := set(stage.shards) - set(stage.leads):
                raise ViewError(f"epoch {self.epoch}: {min(strangers)} owns a shard of stage {number} and is no member")
            self._check_experts(number, stage)

    def _check_experts(self, number: int, stage: Stage) -> None:
        teams = len(stage.teams)
        if stage.sharing < 1 or teams % stage.sharing:
            raise ViewError(f"epoch {self.epoch}: {stage.sharing} of {teams} teams of stage {number} share experts")
        if any(not 0 <= place < stage.sharing for place in stage.experts):
            raise ViewError(
                f"epoch {self.epoch}: stage {number} has experts at {sorted(set(stage.experts))}, of {stage.sharing} "
                "teams that share them"
            )

    def __str__(self) -> str:
        counts = " + ".join(str(len(stage.teams)) for stage in self.stages)
        teams = f" teams of {self.tensor}" if self.tensor > 1 else ""
        blocks = f", blocks {', '.join(f'{a}:{b}' for a, b in pairwise(self.layers))}" if self.layers else ""
        return f"pipeline stages of {counts}{teams}{blocks}"

    @property
    def tensor(self) -> int:
        """Members of a team."""
        return self.stages[0].tensor

    @property
    def alike(self) -> list[tuple[int, ...]]:
        """Members that have the same weights, experts apart: of each stage those with the same part of every matrix."""
        return [stage.part(part) for stage in self.stages for part in range(self.tensor)]

    @property
    def alike_experts(self) -> list[tuple[int, ...]]:
        """Members that have the same experts; none where all of a stage have all."""
        return [
            stage.with_experts(part, place)
            for stage in self.stages
            if stage.sharing > 1
            for part in range(self.tensor)
            for place in range(stage.sharing)
        ]

    def team_of(self, number: int) -> tuple[int, ...]:
        """The members that compute together with one, itself among them."""
        members = self.stages[self.stage_of(number)].members
        first = members.index(number) // self.tensor * self.tensor
        return members[first : first + self.tensor]

    @cached_property
    def members(self) -> tuple[int, ...]:
        """All of them, stage by stage: a member's place here is its rank."""
        return tuple(number for stage in self.stages for number in stage.members)

    def stage_of(self, number: int) -> int:
        """The stage that a member holds.

        Raises:
            ViewError: it is none.
        """
        for place, stage in enumerate(self.stages):
            if number in stage.members:
                return place
        raise ViewError(f"epoch {self.epoch}: there is no member {number}; there are {list(self.members)}")

    @cached_property
    def holders(self) -> dict[int, tuple[int, ...]]:
        """By member those that keep copies of its states (ElasWave, section 7).

        The next ones on the ring of its own stage, and then of the following stages; those on other machines first.
        With teams the rings are of members with the same part; its own team comes last.
        """
        return {number: self._holders_of(number) for number in self.members}

    def _holders_of(self, number: int) -> tuple[int, ...]:
        at, team = self.stage_of(number), self.team_of(number)
        mine = team.index(number)
        ring: list[int] = []
        for part in (mine, *(other for other in range(self.tensor) if other != mine)):
            for step in range(len(self.stages)):
                members = self.stages[(at + step) % len(self.stages)].part(part)
                first = members.index(team[part]) + 1 if not step else 0
                ring += [one for one in members[first:] + members[:first] if one not in team]
        ring += [one for one in team if one != number]
        elsewhere = [one for one in ring if self.hosts[one] != self.hosts[number]]
        here = [one for one in ring if self.hosts[one] == self.hosts[number]]
        return tuple((elsewhere + here)[: self.copies])

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "hosts": {str(number): host for number, host in sorted(self.hosts.items())}}

    @classmethod
    def of_json(cls, told: Mapping[str, Any]) -> View:
        """From what `json` gave.

        Raises:
            ViewError: it is something else.
        """
        try:
            stages = tuple(
                Stage(
                    tuple(one["members"]),
                    tuple(one["shards"]),
                    int(one["tensor"]),
                    int(one.get("sharing", 1)),
                    tuple(one.get("experts", ())),
                )
                for one in told["stages"]
            )
            hosts = {int(number): str(host) for number, host in told["hosts"].items()}
            numbers = int(told["copies"]), int(told.get("expert", 1))
            return cls(int(told["epoch"]), stages, hosts, tuple(told["layers"]), *numbers)
        except (KeyError, TypeError, AttributeError) as error:
            raise ViewError(f"this is no view: {told!r:.200} ({type(error).__name__}: {error})") from None

    @cached_property
    def digest(self) -> str:
        """What all members compare before they use it."""
        raw = json.dumps(self.json(), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(raw.encode(), digest_size=8).hexdigest()
