"""A job of workers that come and go, in one process and on a virtual clock: the real coordinator, changes, pools and
dealing of micro-batches; simulated processes, messages and failures, all drawn from one seed.

What a member's states are is, for every block of its stage, a chain of hashes over the micro-batches of every step, so
that a version, an owner, a block or a micro-batch that is not what it should be is found wherever it came from.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from resilin.cluster.pool import Copy, CopyError, Pool, copy_of
from resilin.cluster.protocol.coordinator import Coordinator
from resilin.cluster.protocol.effects import Fence, Finish, Note, Tell
from resilin.cluster.protocol.messages import (
    Adopt,
    Beat,
    Committed,
    Computed,
    Done,
    End,
    Go,
    Halt,
    Halted,
    Hello,
    Leaving,
    Message,
    Pause,
    Prepare,
    Probe,
    Probed,
    Ready,
    Signal,
    Warm,
    of_json,
    to_json,
)  # fmt: skip
from resilin.cluster.protocol.rules import Rules
from resilin.cluster.view import View
from resilin.parallel.stretches import blocks_in, leaves_in
from resilin.run.elastic_dealing import Dealing, moving

MICROS = 8
TICKS = 3  # of which every member of a stage has a micro-batch, where steps are cut for them
BLOCKS = 5


class WrongError(AssertionError):
    """The protocol has let something happen that must not."""


def after(state: int, step: int, micros: list[int]) -> int:
    """The state of a block after a step of these micro-batches."""
    raw = f"{state}/{step}/{micros}".encode()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=7).digest(), "little")


def blocks_of(view: View, stage: int) -> range:
    """The blocks of a stage."""
    return range(*view.layers[stage : stage + 2]) if view.layers else range(BLOCKS)


def parts_of(view: View, number: int) -> list[int]:
    """What a member has: of each block of its stage a part."""
    blocks, part = blocks_of(view, view.stage_of(number)), view.team_of(number).index(number)
    return [block * view.tensor + part for block in blocks]


@dataclass
class Plan:
    """What is done to a job.

    Attributes:
        seed: of all that is drawn.
        steps: to be taken.
        members: that begin.
        events: (virtual second, what, whom): whom is drawn from a number when it happens.
        stages: of the pipeline.
        copies: of every member's states.
        tensor: members of a team.
        parts: whether stages keep some of a step; else all of it or nothing, and steps are cut for whoever is there.
    """

    seed: int
    steps: int
    members: int
    events: list[tuple[float, str, int]] = field(default_factory=list)
    stages: int = 1
    copies: int = 1
    tensor: int = 1
    parts: bool = True

    @classmethod
    def drawn(cls, seed: int) -> Plan:
        """A schedule of failures."""
        draw = random.Random(seed)
        members, steps = draw.randint(1, 6), draw.randint(4, 14)
        kinds = ["kill"] * 5 + ["stop", "break", "add", "add", "drain", "cut"]
        count = draw.choice([0, 1, 1, 2, 3, 5, 8])
        events = sorted(
            (draw.uniform(0, 0.35 * steps + 2), draw.choice(kinds), draw.randrange(1 << 20)) for _ in range(count)
        )
        if draw.random() < 0.1:  # wishes and breaks while a few steps are taken
            kinds = ["drain", "add", "break", "kill"]
            steps = draw.randint(1, 4)
            events = [(draw.uniform(0.4, 2.5), draw.choice(kinds), draw.randrange(1 << 20)) for _ in range(4)]
        elif draw.random() < 0.05:  # a row of newcomers
            first = draw.uniform(0.5, 2)
            events = [(first + 0.12 * number, "add", 0) for number in range(14)]
        if events and draw.random() < 0.3:  # several at once
            at = events[0][0]
            events[1:3] = [(at + draw.uniform(0, 0.02), "kill", draw.randrange(1 << 20)) for _ in events[1:3]]
        if members > 1 and draw.random() < 0.05:  # all are told to go
            at = draw.uniform(0.8, 2)
            events += [(at + draw.uniform(0, 0.3), "drain", number) for number in range(members)]
        more = random.Random(-1 - seed)
        stages = min(more.choice([1, 1, 2, 3]), members)
        copies = more.choice([1, 1, 1, 2])
        if more.random() < 0.3:  # partitions
            for _ in range(more.choice([1, 1, 2])):
                what = more.choice(["hold", "apart", "sever", "unplug"])
                events.append((more.uniform(0.5, 0.35 * steps + 2), what, more.randrange(1 << 20)))
        tensor = random.Random(-1_000_003 - seed).choice([1, 1, 1, 2, 2, 3])
        parts = random.Random(-2_000_003 - seed).random() < 0.7
        return cls(seed, steps, members * tensor, sorted(events), stages, copies, tensor, parts)


@dataclass
class _Exchange:
    """An exchange of all members of a view."""

    arrived: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)  # owned, and computed just now
    broken: bool = False
    done: bool = False
    pause: bool = False
    home: bool = False


class Sim:
    """A job under a plan.

    Args:
        plan: what happens.
        rules: of the coordinator.
        broken: names of duties that members neglect, to see that it is noticed: "acks" (waiting for copies to arrive
            before a step is taken), "forget" (copies of the last view are dropped at once), "kept" (every
            other member computes micro-batches that another has kept), "stale" (a copy is of the version before),
            "handed" (what was handed on counts as kept).
    """

    def __init__(self, plan: Plan, rules: Rules | None = None, broken: frozenset[str] = frozenset()) -> None:
        self.plan, self.broken = plan, broken
        self.draw = random.Random(plan.seed ^ 0x5EED)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0
        self.rules = rules or Rules(
            members=plan.members,
            silence=3.0,
            hang=50.0,
            stages=plan.stages,
            copies=plan.copies,
            micros=MICROS,
            tensor=plan.tensor,
            keeps_parts=plan.parts or plan.stages == 1,
            even=not plan.parts,
        )
        self.costs = tuple(self.draw.choice([1.0, 2.0]) for _ in range(BLOCKS + 1)) if plan.stages > 1 else ()
        self.takes = tuple(self.draw.uniform(0.5, 3.0) * cost for cost in self.costs)  # what they really cost
        self.coordinator = Coordinator(self.rules)
        self.members: dict[int, SimMember] = {}
        self.exchanges: dict[tuple[int, int], _Exchange] = {}
        self.finish: Finish | None = None
        self.notes: list[Note] = []
        self.truth: dict[int, tuple[int, ...]] = {0: tuple(range(BLOCKS * plan.tensor))}
        self.views: dict[int, str] = {}
        self.committed = self.ended_at = 0
        self.dead_since = 0  # members that died since the last step was taken
        for step in range(plan.steps):
            self.truth[step + 1] = tuple(after(state, step, list(range(MICROS))) for state in self.truth[step])

    def at(self, delay: float, what: Callable[[], None]) -> None:
        """Do something later."""
        self.count += 1
        heapq.heappush(self.events, (self.now + delay, self.count, what))

    def between(self, low: float, high: float) -> float:
        """A random time."""
        return self.draw.uniform(low, high)

    def start(self) -> SimMember:
        """A new process."""
        member = SimMember(self, len(self.members))
        self.members[member.number] = member
        return member

    def run(self, limit: float = 2000.0) -> Sim:
        """Until the job has ended.

        Raises:
            WrongError: something happened that must not, or nothing more does.
        """
        for _ in range(self.plan.members):
            self.start()
        for when, what, whom in self.plan.events:
            self.at(when, lambda what=what, whom=whom: self.disturb(what, whom))
        self.at(0.1, self.tick)
        while self.events and self.finish is None:
            self.now, _, what = heapq.heappop(self.events)
            if self.now > limit:
                raise WrongError(f"nothing was decided after {limit} s: {self}")
            what()
        if self.finish is None:
            raise WrongError(f"nothing happens any more: {self}")
        self.check_end()
        return self

    def __str__(self) -> str:
        said = {m.number: (m.alive, m.phase, m.epoch, m.version) for m in self.members.values()}
        return f"{self.plan}, t={self.now:.3f}, coordinator {self.coordinator.phase}, members {said}"

    def tick(self) -> None:
        """The coordinator's clock."""
        self.do(self.coordinator.tick(self.now))
        self.at(0.1, self.tick)

    def do(self, effects: list) -> None:
        """Carry out what the coordinator decides."""
        for effect in effects:
            if isinstance(effect, Tell):
                self.members[effect.number].post(effect.message)
            elif isinstance(effect, Fence):
                self.members[effect.number].fence()
            elif isinstance(effect, Finish):
                self.finish = self.finish or effect
            else:
                self.notes.append(effect)

    def disturb(self, what: str, whom: int) -> None:
        """A failure, or a wish."""
        alive = [m for m in self.members.values() if m.alive and not m.fenced]
        if not alive:
            return
        member = alive[whom % len(alive)]
        alone = sum(m.epoch >= 0 for m in alive) < 2
        if alone and what in ("kill", "cut", "drain", "hold", "unplug") and self.draw.random() < 0.8:
            what = "add"  # the end of the last one is the end of the job, which tells little
        if what == "kill":
            member.die()
        elif what == "stop":
            member.stopped_until = self.now + self.between(0.1, 6)
        elif what == "break":
            for (epoch, _), exchange in self.exchanges.items():
                if epoch == member.epoch:
                    exchange.broken = True
            member.broke(member.epoch)
        elif what == "cut":  # its connection to the coordinator: it ends, and so does its process
            member.die()
        elif what in ("hold", "apart", "sever", "unplug"):
            member.isolate(what, self.between(0.2, 4 * self.rules.silence))
        elif what == "add":
            self.start()
        elif what == "drain":
            member.tell(Leaving())

    def check_end(self) -> None:
        """What must hold when a job has ended."""
        assert self.finish is not None
        if self.finish.good:
            ends = [m.ended_with for m in self.members.values() if m.ended_with is not None]
            truth = self.truth[self.ended_at if self.coordinator.homeward else self.plan.steps]
            if any(state != truth[block] for end in ends for block, state in end.items()):
                raise WrongError(f"a member ended with another state: {self}")
            if not ends:
                raise WrongError(f"all is well, and nobody is done: {self}")
            return
        why = self.finish.why
        if "lost with everyone" in why and self.whole():
            raise WrongError(f"given up, though all states are there ({self.whole()}): {why}; {self}")
        # One who was alone has no copies elsewhere, until those of the next view are there.
        copies = min((len(h) for view in self.origins() for h in view.holders.values()), default=0)
        if "lost with everyone" in why and self.dead_since <= copies:
            raise WrongError(f"given up after {self.dead_since} deaths since the last step was taken: {why}; {self}")
        if not any(s in why for s in ("lost with everyone", "are left", "before the run began", "cannot hold")):
            raise WrongError(f"the job ended since {why!r}: {self}")

    def whole(self) -> list[tuple[int, int]]:
        """(epoch, version) that exist in whole among those who are alive, and had arrived when they were asked."""
        alive = [m for m in self.members.values() if m.alive and not m.fenced]
        found = []
        for view in self.origins():
            epoch = view.epoch
            have = [
                {v for m in alive for v in m.pool.versions().get((o, epoch), []) if (o, epoch, v) not in m.late}
                for o in view.members
            ]
            found += [(epoch, v) for v in set.intersection(*have)]
        return found

    def origins(self) -> list[View]:
        """The views under which copies may be of use."""
        return [view for view in (self.coordinator.view, *self.coordinator._origins) if view is not None]


class SimMember:
    """A process: what `resilin.run.elastic` does, without doing it."""

    def __init__(self, sim: Sim, number: int) -> None:
        self.sim, self.number, self.alive = sim, number, True
        self.silent_until = self.apart_until = 0.0  # cut off from the coordinator, from other members
        self.fenced = False  # declared lost while nothing reached it, which it does not know
        self.pool = Pool(number)
        self.phase, self.epoch = "starting", -1
        self.adopt: Adopt | None = None
        self.version = 0
        self.state: dict[int, int] = {}
        self.doing: list[int] = []  # micro-batches that it computes
        self.kept: tuple[int, list[int]] | None = None
        self.cut = (0, 0)  # of the step that it computed last: micro-batches, and for how many
        self.computed_in: tuple[int, ...] = ()  # with these bounds of stages
        self.past = -1  # the last step whose micro-batches are all computed, in this view
        self.handed = -1  # the step of which gradients were given to other stages
        self.acked = -1
        self.pausing = self.stopping = self.homeward = False
        self.life = 0  # raised when what is under way is given up
        self.stopped_until = 0.0
        self.ended_with: dict[int, int] | None = None
        self.late: set[tuple[int, int, int]] = set()  # copies that came after it had said what it has
        self.updating = False
        self.said = self.heard = 0.0
        self.tell(Hello(f"host{number % 3}"))
        self.later(0.05, 0.5, self.is_warm)
        self.beat()

    @property
    def phase(self) -> str:
        """What it does."""
        return self._phase

    @phase.setter
    def phase(self, now: str) -> None:
        self._phase, self.began = now, self.sim.now

    # -- partitions ---------------------------------------------------------------------------------------------

    def isolate(self, what: str, seconds: float) -> None:
        """Be cut off: from the coordinator (hold), the members (apart; sever: and connections end), or all (unplug)."""
        until = self.sim.now + seconds
        if what in ("hold", "unplug"):
            self.silent_until = max(self.silent_until, until)
            self.sim.at(self.sim.rules.silence + 0.5, self.gives_up)  # counted from the first word that was lost
            self.sim.at(seconds + 1e-3, self.comes_back)
        if what != "hold":
            self.apart_until = max(self.apart_until, until)
        if what == "sever":
            self.ends(self.epoch, 0.02)

    def gives_up(self) -> None:
        """Nothing that it said to the coordinator has arrived for so long: its connection has ended, and it ends."""
        if self.sim.now < self.silent_until:
            self.die()

    def comes_back(self) -> None:
        """If it was declared lost, its connection was ended meanwhile."""
        if self.fenced and self.sim.now >= self.silent_until:
            self.die()

    def fence(self) -> None:
        """The coordinator wants it to end."""
        if self.alive and self.sim.now < self.silent_until:
            self.fenced = True
            self.sim.dead_since += self.epoch >= 0
        else:
            self.die()

    def reaches(self, other: SimMember, later: float = 0.0) -> bool:
        """Whether messages between both get through, then."""
        return other is self or max(self.apart_until, other.apart_until) <= self.sim.now + later

    def together(self, members: tuple[int, ...]) -> bool:
        """Whether all reach each other."""
        others = [self.sim.members[number] for number in members]
        return len(others) < 2 or all(one.apart_until <= self.sim.now for one in others)

    def ends(self, epoch: int, within: float) -> None:
        """The connections of its groups end, and whoever is reached notices."""
        for other in self.sim.members.values():
            if other.alive and other.epoch == epoch and epoch >= 0 and other is not self and self.reaches(other):
                other.later(0.0005, within, partial(other.broke, epoch))

    def probe(self, asked: Probe) -> None:
        """Tell who is not reached, in the time that a connection has to be made."""
        patience = self.sim.rules.silence
        others = [self.sim.members[number] for number in asked.members if number != self.number]
        slow = [other for other in others if not other.alive or not self.reaches(other) or self.stops(other)]

        def told() -> None:
            lacking = [o.number for o in slow if not o.alive or not self.reaches(o) or self.stops(o)]
            if self.alive:
                self.tell(Probed(asked.number, tuple(lacking)))

        self.sim.at(patience if slow else self.sim.between(0.0005, 0.01), told)

    def stops(self, other: SimMember) -> bool:
        """Whether another does nothing now."""
        return other.stopped_until > self.sim.now

    # -- time and messages --------------------------------------------------------------------------------------

    def later(self, low: float, high: float, what: Callable[[], None]) -> None:
        """Go on after a while, unless this is given up before."""
        life = self.life

        def go() -> None:
            if not self.alive or life != self.life:
                return
            if self.sim.now < self.stopped_until:
                self.sim.at(self.stopped_until - self.sim.now + 1e-6, go)
            else:
                what()

        self.sim.at(self.sim.between(low, high), go)

    def tell(self, message: Message) -> None:
        """To the coordinator: in order, after a while; what is on its way arrives even if the process dies."""
        read = of_json(to_json(message))
        self.said = max(self.said + 1e-9, self.sim.now + self.sim.between(0.0002, 0.02), self.silent_until)
        delay = self.said - self.sim.now
        self.sim.at(delay, lambda: self.sim.do(self.sim.coordinator.told(self.number, read, self.sim.now)))

    def post(self, message: Message) -> None:
        """From the coordinator."""
        read = of_json(to_json(message))
        self.heard = max(self.heard + 1e-9, self.sim.now + self.sim.between(0.0002, 0.02))

        def take() -> None:
            if not self.alive:
                return
            if self.sim.now < max(self.stopped_until, self.silent_until):
                self.heard = max(self.heard, self.stopped_until, self.silent_until) + 1e-6
                self.sim.at(self.heard - self.sim.now, take)
            else:
                self.take(read)

        self.sim.at(self.heard - self.sim.now, take)

    def beat(self) -> None:
        """A sign of life."""
        if not self.alive:
            return
        if self.sim.now >= self.stopped_until:
            self.tell(Beat(self.version, "", self.phase, (-1,), self.sim.now - self.began, ""))
        self.sim.at(0.4, self.beat)

    def die(self) -> None:
        """The end of the process; others notice broken connections, the coordinator the exit."""
        if not self.alive:
            return
        self.alive = False
        if self.phase != "starting" and self.epoch >= 0 and not self.fenced:
            self.sim.dead_since += 1
        self.sim.at(
            self.sim.between(0.0005, 0.05),
            lambda: self.sim.do(self.sim.coordinator.gone(self.number, "was killed", self.sim.now)),
        )
        self.ends(self.epoch, 0.05)

    # -- what the coordinator says ------------------------------------------------------------------------------

    def take(self, message: Message) -> None:
        """A message."""
        if isinstance(message, Adopt):
            if message.view.epoch <= self.epoch or self.number not in message.view.members:
                raise WrongError(f"member {self.number} in epoch {self.epoch} is told {message}")
            if self.phase not in ("warm", "halted"):
                raise WrongError(f"member {self.number} is given a place while it is {self.phase}")
            self.adopt, self.epoch = message, message.view.epoch
            self.pausing, self.stopping, self.past = False, False, -1
            self.phase = "placing"
            self.later(0.005, 0.1, self.place)
        elif isinstance(message, Halt):
            if message.epoch == self.epoch and self.phase != "halted":
                self.come_out(message.why)
        elif isinstance(message, Pause):
            here = message.epoch == self.epoch
            self.pausing, self.stopping = here and not message.computed, here and message.computed
            if self.stopping and self.past >= 0:
                self.tell(Computed(self.epoch, self.past))
        elif isinstance(message, Prepare):
            if self.phase not in ("warm", "halted") and self.number not in message.before.members:
                raise WrongError(f"member {self.number} is told to prepare while it is {self.phase}")
        elif isinstance(message, Go):
            if message.epoch == self.epoch and self.phase == "ready":
                assert self.adopt is not None
                digest = self.sim.views.setdefault(message.epoch, self.adopt.view.digest)
                if digest != self.adopt.view.digest:
                    raise WrongError(f"two views of epoch {message.epoch}")
                self.boundary()
        elif isinstance(message, Probe):
            self.probe(message)
        elif isinstance(message, Signal):
            self.homeward = True
        elif isinstance(message, End):
            self.alive = False
            for other in self.sim.members.values():
                if other.alive and other.epoch == self.epoch and other.phase in ("exchanging",):
                    other.later(0.0005, 0.02, partial(other.broke, self.epoch))

    def broke(self, epoch: int) -> None:
        """A connection of an epoch has ended."""
        if epoch == self.epoch and self.phase in ("placing", "running", "computed", "exchanging"):
            self.come_out("a connection was lost")

    def come_out(self, why: str) -> None:
        """Give up what is under way, and say where it stands."""
        self.life += 1
        self.phase = "halted"
        self.late.clear()
        copies = tuple((owner, epoch, tuple(v)) for (owner, epoch), v in self.pool.versions().items())
        if (
            self.doing and self.adopt is not None and len(self.adopt.view.stages) > 1 and self.sim.plan.parts
        ):  # some are finished
            before = self.kept[1] if self.kept is not None and self.kept[0] == self.version else []
            more = self.sim.draw.sample(self.doing, self.sim.draw.randint(0, len(self.doing)))
            self.kept = self.version, sorted({*before, *more})
        self.doing = []
        if self.kept is not None and self.kept[0] == self.handed and "handed" not in self.broken_duties:
            self.kept = None
        step, kept = self.kept if self.kept is not None else (self.version, [])
        version = -1 if self.updating else self.version
        self.tell(Halted(self.epoch, why, version, step, copies, tuple(kept), self.cut if kept else (0, 0)))
        self.updating = False
        self.ends(self.epoch, 0.02)  # its own sockets are closed: a cascade

    # -- the work -----------------------------------------------------------------------------------------------

    def is_warm(self) -> None:
        """Ready for a place."""
        self.phase = "warm"
        self.tell(Warm(self.sim.costs))

    def place(self) -> None:
        """Take the states of its place from copies."""
        adopt = self.adopt
        assert adopt is not None
        if not self.together(adopt.view.members) or not all(
            self.reaches(self.sim.members[number]) for number in adopt.where.values()
        ):  # neither groups nor copies are to be had
            self.later(0.02, 0.1, self.place)
            return
        blocks = parts_of(adopt.view, self.number)
        if adopt.before is None and self.version:
            raise WrongError(f"member {self.number} is to begin, and has version {self.version}")
        if adopt.before is None:
            self.state = {block: self.sim.truth[0][block] for block in blocks}
        else:
            truth, found = self.sim.truth[adopt.version], set()
            for owner, where in adopt.where.items():
                holder = self.sim.members[where]
                if not holder.alive:
                    self.come_out("a member went away")
                    return
                try:
                    copy = holder.pool.get(owner, adopt.before.epoch, adopt.version)
                except CopyError as error:
                    raise WrongError(f"what was said to be there is not: {error}") from None
                for slot in copy.slots:
                    found.add(int(slot.path))
                    if int(copy.tensor(slot)) != truth[int(slot.path)]:
                        raise WrongError(f"block {slot.path} of version {adopt.version} at {owner} is not {truth}")
            if not found >= set(blocks):
                raise WrongError(f"blocks {sorted(found)} have copies, and {list(blocks)} are wanted")
            if self.version - adopt.version > 1:
                raise WrongError(f"member {self.number} is set back from {self.version} to {adopt.version}")
            self.version, self.state = adopt.version, {block: truth[block] for block in blocks}
        mine = tuple(adopt.kept.get(self.number, ()))
        if mine:
            bounds = adopt.before.layers if adopt.handed and adopt.before is not None else adopt.view.layers
            if self.computed_in != bounds:
                raise WrongError(f"member {self.number} has computed with {self.computed_in}, and is to keep {adopt}")
            if self.kept is None or self.kept[0] != self.version or not set(mine) <= set(self.kept[1]):
                raise WrongError(f"member {self.number} is to keep {mine} of step {self.version}, and has {self.kept}")
            if {leaf for b in blocks_in(self.kept[1]) if set(leaves_in(b)) <= set(mine) for leaf in leaves_in(b)} != {
                *mine
            }:
                raise WrongError(f"of the blocks {blocks_in(self.kept[1])}, {mine} is to be kept")
        if adopt.kept and not self.sim.rules.keeps_parts:
            self.nothing_is_left(adopt)
        if adopt.handed:
            self.handed = self.version
            self.nothing_is_left(adopt)
        self.kept = (self.version, list(mine)) if mine else None
        if "forget" in self.broken_duties:
            self.pool.forget(self.epoch)
        self.phase, self.acked = "ready", -1
        self.tell(Ready(self.epoch, adopt.view.digest, self.digest(self.state)))

    def nothing_is_left(self, adopt: Adopt) -> None:
        """All of the step was computed, by all stages and parts; members may have moved since."""
        assert adopt.before is not None
        for place, stage in enumerate(adopt.before.stages if adopt.handed else adopt.view.stages):
            wanted = list(range(self.micros_of(adopt, adopt.version, place)))
            for part in range(adopt.view.tensor):
                if sorted(micro for number in stage.part(part) for micro in adopt.kept.get(number, ())) != wanted:
                    raise WrongError(f"not all of the step is kept: {adopt}")

    @staticmethod
    def workers_of(adopt: Adopt, step: int, stage: int) -> int:
        """For whom a stage's micro-batches of a step are cut."""
        return adopt.cut[stage] if adopt.cut and step == adopt.version else len(adopt.view.stages[stage].teams)

    def micros_of(self, adopt: Adopt, step: int, stage: int) -> int:
        """Micro-batches of a step: where a stage cuts it for its members, their number depends on how many."""
        return MICROS if self.sim.plan.parts else TICKS * self.workers_of(adopt, step, stage)

    @staticmethod
    def digest(state: dict[int, int]) -> str:
        return f"{after(0, 0, [number for block in sorted(state.items()) for number in block]):x}"

    @property
    def broken_duties(self) -> frozenset[str]:
        return self.sim.broken

    def boundary(self) -> None:
        """Keep a copy, send it, and go on."""
        adopt = self.adopt
        assert adopt is not None
        self.phase = "running"
        state = self.state
        if "stale" in self.broken_duties and self.version:
            state = {block: self.sim.truth[self.version - 1][block] for block in state}
        slots = [("", str(block), torch.tensor(one)) for block, one in sorted(state.items())]
        copy = copy_of(self.number, self.epoch, self.version, slots, None)
        self.pool.put(copy)
        if self.version > adopt.version:
            self.pool.forget(self.epoch)
        mine = blocks_of(adopt.view, adopt.view.stage_of(self.number))
        takes = sum(self.sim.takes[block] for block in mine) if self.sim.takes else 0.0
        if self.sim.takes and mine.stop == BLOCKS:
            takes += self.sim.takes[-1]
        self.tell(Committed(self.epoch, self.version, max(0, self.version - adopt.version - 1), takes))
        holders = adopt.view.holders[self.number]
        if not holders:
            self.acked = self.version
        self.send(copy, list(holders))
        if self.version >= self.sim.plan.steps:
            self.is_done()
            return
        self.later(0.0, 0.002, lambda: self.enter("agree", ([], []), self.computes))

    def is_done(self) -> None:
        """All steps were taken, or all were told to save and end."""
        self.phase, self.ended_with, self.sim.ended_at = "done", self.state, self.version
        self.tell(Done(self.epoch, self.version, self.digest(self.state)))

    def send(self, copy: Copy, left: list[int]) -> None:
        """A copy on its way to one holder after the other."""
        if not left:
            self.acked = max(self.acked, copy.version)
            if self.kept is not None and self.kept[0] < copy.version:
                self.kept = None
            return
        holder = self.sim.members[left[0]]

        def arrives() -> None:
            if not holder.alive:
                return
            until = max(holder.stopped_until, self.apart_until, holder.apart_until)
            if until > self.sim.now:
                self.sim.at(until - self.sim.now + 1e-6, arrives)
                return
            holder.pool.put(copy)
            if holder.phase == "halted":
                holder.late.add((copy.owner, copy.epoch, copy.version))
            if self.alive and self.life == life:
                self.later(0.0005, 0.01, lambda: self.send(copy, left[1:]))

        life, whole = self.life, self.sim.draw.random() < 0.5  # all of it is on its way, or not yet
        self.sim.at(self.sim.between(0.001, 0.15), lambda: arrives() if self.life == life or whole else None)

    def computes(self) -> None:
        """Forward and backward over its micro-batches."""
        adopt = self.adopt
        assert adopt is not None
        if self.sim.exchanges[self.epoch, 2 * self.version].pause:
            self.come_out("a change was announced")
            return
        if self.sim.exchanges[self.epoch, 2 * self.version].home:
            self.is_done()
            return
        neglects = "kept" in self.broken_duties and self.number % 2
        dealing = Dealing(replace(adopt, kept={}) if neglects else adopt)
        stage = adopt.view.stage_of(self.number)
        count, dealt = self.micros_of(adopt, self.version, stage), dealing.of_step
        if not self.sim.plan.parts and len(adopt.view.stages) > 1:
            dealt = dealing.together(stage)
        mine = list(dealt(self.version, count)[adopt.view.members.index(self.number)])
        todo = [m for m in mine if self.kept is None or self.kept[0] != self.version or m not in self.kept[1]]
        self.doing, self.computed_in = todo, adopt.view.layers

        def finished() -> None:
            self.kept, self.doing, self.past = (self.version, mine), [], self.version
            self.cut = count, self.workers_of(adopt, self.version, stage)
            if self.stopping:  # until all are so far
                self.phase = "computed"
                self.tell(Computed(self.epoch, self.version))
            else:
                self.exchange((mine, todo))

        self.later(0.01 * len(todo), 0.05 * len(todo) + 0.001, finished)

    def exchange(self, mine: tuple[list[int], list[int]]) -> None:
        """The exchange of the step, once its copies are at their holders."""
        if self.acked < self.version and "acks" not in self.broken_duties:
            self.later(0.005, 0.01, lambda: self.exchange(mine))
            return
        self.enter("step", mine, self.update)

    def enter(self, what: str, mine: tuple[list[int], list[int]], go_on: Callable[[], None]) -> None:
        """A collective of all members of the view; each comes out at a time of its own."""
        adopt = self.adopt
        assert adopt is not None
        self.phase = "exchanging"
        key = self.epoch, 2 * self.version + (what == "step")
        exchange = self.sim.exchanges.setdefault(key, _Exchange())
        exchange.arrived[self.number] = mine
        exchange.pause |= self.pausing
        exchange.home |= self.homeward
        if exchange.broken:
            self.later(0.0005, 0.02, partial(self.broke, self.epoch))
            return
        if len(exchange.arrived) == len(adopt.view.members):
            self.complete(exchange, adopt, what, go_on)

    def complete(self, exchange: _Exchange, adopt: Adopt, what: str, go_on: Callable[[], None]) -> None:
        """All have come: they go on once all that they say gets through."""
        view = adopt.view
        if not self.together(view.members):
            self.later(0.02, 0.1, lambda: self.complete(exchange, adopt, what, go_on))
            return
        if what == "step":
            computed = []
            for place, stage in enumerate(view.stages):
                count = self.micros_of(adopt, self.version, place)
                for part in range(view.tensor):
                    told = [exchange.arrived[number] for number in stage.part(part)]
                    given = adopt.handed and self.version == adopt.version and place in moving(adopt)
                    if sorted(m for owned, _ in told for m in owned) != ([] if given else list(range(count))):
                        raise WrongError(f"step {self.version} of epoch {self.epoch} is taken of {exchange.arrived}")
                    computed.append(sorted(m for _, now in told for m in now))
                for team in stage.teams:
                    if any(exchange.arrived[number] != exchange.arrived[team[0]] for number in team):
                        raise WrongError(f"team {team} computes different micro-batches: {exchange.arrived}")
            if any(
                each != computed[0] if self.sim.plan.parts else bool(each) != bool(computed[0]) for each in computed
            ):
                raise WrongError(f"stages compute different micro-batches in epoch {self.epoch}: {computed}")
            exchange.done = True
            self.sim.committed = max(self.sim.committed, self.version + 1)
            self.sim.dead_since = sum(not self.sim.members[number].alive for number in view.members)
        for number in view.members:
            other = self.sim.members[number]
            if other.alive and other.epoch == self.epoch and other.phase == "exchanging":
                other.later(0.0005, 0.01, go_on if other is self else other.resumes(what))

    def resumes(self, what: str) -> Callable[[], None]:
        return self.update if what == "step" else self.computes

    def update(self) -> None:
        """The update of the weights; until it ends there is no version."""
        assert self.sim.exchanges[self.epoch, 2 * self.version + 1].done
        self.phase, self.updating = "exchanging", True
        if not self.sim.plan.parts:
            self.kept = None

        def updated() -> None:
            self.updating = False
            micros = list(range(MICROS))
            self.state = {block: after(one, self.version, micros) for block, one in self.state.items()}
            self.version += 1
            if any(one != self.sim.truth[self.version][block] for block, one in self.state.items()):
                raise WrongError(f"version {self.version} is wrong in epoch {self.epoch}")
            self.boundary()

        self.later(0.002, 0.03, updated)


def simulate(seed: int, broken: frozenset[str] = frozenset()) -> Sim:
    """One job under the schedule of a seed."""
    return Sim(Plan.drawn(seed), broken=broken).run()
