"""Ranks that talk to each other, as one of them sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from resilin.parallel.activity import waiting
from resilin.parallel.meeting import meet
from resilin.parallel.neighbours import Neighbours

_met: WeakValueDictionary[str, Neighbours] = WeakValueDictionary()  # by name of the process group


def _until_done(work: Any) -> None:
    work.wait()


@dataclass(frozen=True, slots=True)
class Group:
    """Some ranks, in order; every one of them has an equal object but for `index`.

    Attributes:
        ranks: their numbers in the whole job.
        index: which of them this process is.
        process_group: what torch's collectives take; None where there is one rank only, who needs none.
        wait: for a collective of this group that is under way.
        wait_message: for a message between two of its ranks.
        make: another group of such ranks, called by all of them; None: by torch's default groups.
        near: what exchanges through memory, where all ranks are on the CPUs of one machine; None: messages do.
    """

    ranks: tuple[int, ...]
    index: int
    process_group: dist.ProcessGroup | None = None
    wait: Callable[[Any], object] = field(default=_until_done, compare=False)
    wait_message: Callable[[Any], object] = field(default=_until_done, compare=False)
    make: Callable[[tuple[int, ...]], Group] | None = field(default=None, compare=False)
    near: Neighbours | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.index < len(self.ranks):
            raise ValueError(f"a group of {len(self.ranks)} ranks has no rank {self.index}")
        if (self.process_group is None) != (len(self.ranks) == 1):
            raise ValueError(f"a group of {len(self.ranks)} ranks is given {self.process_group}")

    def __deepcopy__(self, _: object) -> Group:
        """Itself: a model that is copied (for a reference, or an average) talks to the same ranks."""
        return self

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.ranks)

    @property
    def name(self) -> str:
        """By which `named` finds it again; of a group with a process group."""
        assert self.process_group is not None
        return str(self.process_group.group_name)

    @property
    def backend(self) -> str:
        """The library that carries its messages: "gloo", "nccl"; "" where there are none."""
        if self.process_group is None:
            return ""
        try:
            return dist.get_backend(self.process_group)
        except ValueError:  # torch does not list groups that it did not make itself (`resilin.cluster.links`)
            return str(self.process_group.name()).lower()

    @property
    def rank(self) -> int:
        """This process's number in the whole job."""
        return self.ranks[self.index]

    def met(self, timeout: float | None = None) -> Group:
        """The same group, whose ranks exchange through memory where they can; all of them call together.

        Args:
            timeout: seconds that a rank waits for another; None: as the process group does.
        """
        if self.size == 1 or self.backend != "gloo":
            return self
        assert self.process_group is not None
        if timeout is None:
            timeout = _timeout_of(self.process_group)
        with waiting(self.ranks, "meeting the others"):
            met = meet(self.ranks, self.index, timeout, self._tell, self._all_did)
        return self if met is None else replace(self, near=Neighbours(self.index, met))

    def _tell(self, numbers: list[int]) -> list[list[int]]:
        mine = torch.tensor(numbers)
        told = [torch.empty_like(mine) for _ in self.ranks]
        self.wait(dist.all_gather(told, mine, group=self.process_group, async_op=True))
        return [each.tolist() for each in told]

    def _all_did(self, done: bool) -> bool:
        failures = torch.tensor([not done], dtype=torch.int64)
        self.wait(dist.all_reduce(failures, group=self.process_group, async_op=True))
        return not int(failures)

    def among(self, members: Sequence[int]) -> Group:
        """The group of some of these ranks, this one among them, made by all of them together.

        Args:
            members: their places here, ascending.
        """
        if len(members) == self.size:
            return self
        ranks = tuple(self.ranks[member] for member in members)
        if self.make is not None:
            return self.make(ranks)
        made = dist.new_group(list(ranks), use_local_synchronization=True, group_desc="copies")
        return _listed(Group(ranks, list(members).index(self.index), made).met())

    @classmethod
    def alone(cls, rank: int = 0) -> Group:
        """One rank by itself."""
        return cls((rank,), 0)

    @classmethod
    def of(cls, process_group: dist.ProcessGroup | None = None) -> Group:
        """All ranks of a process group of torch (None: of the default one)."""
        known = process_group if process_group is not None else dist.group.WORLD
        ranks = tuple(dist.get_process_group_ranks(known))
        return cls(ranks, ranks.index(dist.get_rank()), known if len(ranks) > 1 else None)


def named(name: str) -> Group:
    """The group of a name, for compiled code, which keeps names only: process groups end when nobody holds them."""
    c10d: Any = dist.distributed_c10d
    return replace(Group.of(c10d._resolve_process_group(name)), near=_met.get(name))


def of_all() -> Group:
    """All ranks of torch's default group, who call together."""
    return _listed(Group.of().met())


def _listed(group: Group) -> Group:
    """A group that `named` finds."""
    if group.process_group is not None:
        _met.pop(group.name, None)
        if group.near is not None:
            _met[group.name] = group.near
    return group


def _timeout_of(process_group: dist.ProcessGroup) -> float:
    backend: Any = process_group._get_backend(torch.device("cpu"))
    return float(backend.options._timeout.total_seconds())


def make_groups(members: Sequence[Sequence[int]], rank: int, name: str) -> Group:
    """The group of a rank, made by all ranks together, each calling with the same list.

    Args:
        members: disjoint groups of ranks.
        rank: this process's.
        name: what the groups are for, shown by torch's debugging aids.
    """
    mine = None
    for number, ranks in enumerate(members):
        made = dist.new_group(list(ranks), group_desc=f"{name}{number}") if len(ranks) > 1 else None
        if rank in ranks:
            mine = Group(tuple(ranks), list(ranks).index(rank), made)
    if mine is None:
        raise ValueError(f"rank {rank} is in none of the groups {members}")
    return _listed(mine.met())
