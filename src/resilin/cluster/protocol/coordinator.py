"""The one who decides: which members there are, what each is, and from which version all go on. Pure.

Every change is one new epoch. Whoever takes part in the one that ends comes out of its work, says what copies it has,
and waits; then everyone is told what it is from now on, moves states, and says that it is ready; then all go on. A
member that is lost at any of these points is one more change. So there is one path for every failure, and nobody trains
in a view that somebody else does not have (ElasWave, sections 7 and 9).

Which copies are needed when: the states of a version are complete under the view in which that version was last
copied by all. Copies made under a view stay until a step under a later one has been taken by all, since only then are
those of that one known to be at their holders. So of the views since the last step, one always has a complete version
unless a member and all of its holders were lost together. Whoever leaves stays as long, since its memory is one of the
places where such copies are; and nobody joins before, so that a row of newcomers does not keep the others from work.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from resilin.cluster.changes import NobodyLeftError, changed, first_view, gaining
from resilin.cluster.protocol.dividing import Dividing
from resilin.cluster.protocol.effects import Effect, Fence, Finish, Note, Tell
from resilin.cluster.protocol.kept import all_is_kept, cut_of, kept_by
from resilin.cluster.protocol.messages import (
    Adopt,
    Beat,
    Committed,
    Computed,
    Done,
    End,
    Failed,
    Go,
    Halt,
    Halted,
    Hello,
    Leaving,
    Message,
    Pause,
    Prepare,
    Probed,
    Ready,
    Signal,
    Warm,
)
from resilin.cluster.protocol.newest import holding, newest_whole
from resilin.cluster.protocol.reach import Probing
from resilin.cluster.protocol.roster import Member, Roster
from resilin.cluster.protocol.rules import Rules
from resilin.cluster.view import View
from resilin.parallel.pipeline.errors import ScheduleError

_TRIES = 3  # to move blocks in the middle of a step, before they move between two
_PUNCTUAL = 0.25  # of `Rules.silence`: a clock that is later than that did not run

Phase = Literal["gathering", "running", "pausing", "halting", "adopting", "ended"]


@dataclass
class _Times:
    """When a change began, and when its parts were done; seconds."""

    lost: float = 0.0
    halted: float = 0.0
    why: list[str] = field(default_factory=list)


class Coordinator:
    """Decides.

    Args:
        rules: see there.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.dividing = Dividing(rules)
        self.phase: Phase = "gathering"
        self.members = Roster()
        self.view: View | None = None
        """The last one that all were ready for."""
        self.version = 0
        """The newest that any member has told of."""
        self.homeward = False
        """Whether all save and end, since too few would stay."""
        self._next: View | None = None
        self._adopt: Adopt | None = None
        self._origins: list[View] = []  # whose copies may still be needed, beside those of `view`; the last one first
        self._resumed: int | None = None  # the version that the present view began with, once it is known
        self._start: int | None = None  # the version that the run began with
        self._known: set[int] = set()  # all numbers that ever were
        self._wished = False  # whether the change under way is a join or a leave
        self._explained = False  # whether somebody was lost in it, or else all are known to reach each other
        self._probing = Probing(rules.silence)
        self._ticked: float | None = None
        self._computed = False  # and whether all come out before they exchange a step's gradients
        self._moves = False  # whether blocks, or members, are to move then
        self._unlike = 0  # how often in a row they could not, as not all micro-batches were there
        self._epoch = -1
        self._experts = 0  # of a layer, which members may have between them
        self._aborted = 0
        self._failures: dict[int, list[Failed]] = {}
        self._times = _Times()
        self._out: list[Effect] = []

    # -- inputs -------------------------------------------------------------------------------------------------

    def told(self, number: int, message: Message, now: float) -> list[Effect]:
        """A member said something. Whoever is gone, or was never there, is not heard."""
        if self.phase != "ended":
            if isinstance(message, Hello):
                if number not in self._known:  # a late word of one that was lost does not bring it back
                    self._known.add(number)
                    self.members[number] = Member(message.host, now)
            elif number in self.members:
                member = self.members[number]
                member.heard = now
                self._hear(number, member, message, now)
        return self._effects()

    def gone(self, number: int, why: str, now: float) -> list[Effect]:
        """A process has ended, or its connection has."""
        if number in self.members and self.phase != "ended":
            self._lose(number, why, now)
        return self._effects()

    def tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        late = 0.0 if self._ticked is None else now - self._ticked
        self._ticked = now
        if late > _PUNCTUAL * self.rules.silence:  # this process did not run: what others said meanwhile is to be heard
            for member in self.members.values():
                member.heard = min(member.heard + late, now)
        if self.phase != "ended":
            for number, member in list(self.members.items()):
                beat = member.beat
                if now - member.heard > self.rules.silence:
                    why = f"was not heard of for {now - member.heard:.1f} s"
                elif beat is not None and not beat.waits_for and beat.seconds > self.rules.hang and member.warm:
                    why = f"has been {beat.doing} of step {beat.step} for {beat.seconds:.0f} s, at {beat.at}"
                else:
                    continue
                self._out.append(Fence(number, why))
                self._lose(number, why, now)
                if self._over:
                    break
            self._suspect(now)
        return self._effects()

    def stop(self, why: str, failure: str = "") -> list[Effect]:
        """End the job at once; see `Finish`."""
        if self.phase != "ended":
            self._end(False, why, failure)
        return self._effects()

    @property
    def _over(self) -> bool:
        return self.phase == "ended"

    def _effects(self) -> list[Effect]:
        out, self._out = self._out, []
        return out

    # -- what is heard ------------------------------------------------------------------------------------------

    def _hear(self, number: int, member: Member, message: Message, now: float) -> None:
        if isinstance(message, Beat):
            member.beat = message
        elif isinstance(message, Warm):
            member.warm = True
            self.dividing.costs(message.costs)
            self._experts = message.experts
            if self.phase != "gathering":
                self._note("ready", member=number)
            self._consider(now)
        elif isinstance(message, Leaving):
            if not member.leaving and not self.homeward:
                member.leaving = True
                self._note("leaving", member=number)
                if member.epoch < 0 and (self.phase != "gathering" or self.rules.patient):
                    self._out.append(Tell(number, End(0, "it left before it had a place")))  # nobody needs what it has
                    del self.members[number]
                elif not self._go_home():
                    self._consider(now)
        elif isinstance(message, Halted):
            if message.epoch == member.epoch:
                member.halted, member.ready, member.done = message, None, None
                if self.phase == "pausing":  # as all were told to; one that is done, say, would not notice
                    self._halt("", now)
                elif self.phase in ("running", "adopting"):
                    self._halt(f"member {number} came out: {message.why}", now)
                self._decide(now)
        elif isinstance(message, Ready):
            if self.phase == "adopting" and message.epoch == self._epoch:
                member.ready = message
                self._all_ready(now)
        elif isinstance(message, Committed):
            member.committed = message
            self._took(message, now)
        elif isinstance(message, Computed):
            member.computed = message
            if self.phase == "pausing" and self._computed:
                assert self.view is not None
                if self.members.all_computed(self.view, self.version):
                    self._halt("", now)
        elif isinstance(message, Probed):
            if self._probing.answered(number, message):
                self._judge(now)
        elif isinstance(message, Done):
            if self.view is not None and message.epoch == self.view.epoch:
                member.done = message
                self._all_done()
        elif isinstance(message, Failed):
            member.failed = message
            if member.epoch < 0 and self.phase != "gathering":
                return  # a newcomer that does not get ready changes nothing for the others
            several = self._failures.setdefault(message.step, [])
            several.append(message)
            if len(several) >= self.rules.failures or len(self.members.staying()) <= self.rules.least:
                first = several[0]
                self._end(False, f"member {number} failed at step {first.step}: {first.why}", first.trace)

    def _took(self, message: Committed, now: float) -> None:
        if self.view is None or message.epoch != self.view.epoch:
            return
        begins = message.version > self.version
        self.version = max(self.version, message.version)
        self._probing.new_begun()
        if self._start is None:
            self._start = message.version
        if self._resumed is None:
            self._resumed = self._start
        if message.version > self._resumed:  # an exchange under this view was completed: its copies are at the holders
            self._aborted, self._origins = 0, []
            self._part()
            self.dividing.measure(self.view, {number: one.committed for number, one in self.members.items()})
            self._consider(now, begins=begins)

    @property
    def _moving(self) -> bool:
        """Whether a step was taken under the present view."""
        return self._resumed is not None and self.version > self._resumed

    def _part(self) -> None:
        """Let those go whose states, and whose copies of others', are elsewhere by now; who has lost its team waits."""
        assert self.view is not None
        for number in self.members.placed():
            if number in self.view.members:
                continue
            if self.members[number].leaving:
                self._out.append(Tell(number, End(0, "its states are elsewhere now")))
                del self.members[number]
            else:
                member = self.members[number]
                member.epoch, member.halted = -1, None
                self._note("spare", member=number, why=f"its team was broken up, and {self.rules.tensor} make one")

    # -- changes ------------------------------------------------------------------------------------------------

    def _go_home(self) -> bool:
        """Where too few would stay, nobody leaves: the run is saved while all states are there, and ends."""
        view = self._next
        least = max(self.rules.least, self.rules.stages * self.rules.tensor)
        if view is None or len(self.members.hosts()) >= least:
            return False
        self.homeward = True
        self._note("homeward", why=f"fewer than {least} would stay")
        for number in self.members.there(view.members):
            self.members[number].leaving = False
            self._out.append(Tell(number, Signal(signal.SIGINT)))
        return True

    def _consider(self, now: float, begins: bool = False) -> None:
        """Somebody may come or go.

        Args:
            now: seconds.
            begins: whether the first member has just begun a step.
        """
        if self.phase == "gathering":
            ready = [number for number, member in sorted(self.members.items()) if member.warm]
            if len(ready) >= self.rules.members:
                self._times = _Times(now, now, ["the run begins"])
                self._begin(ready, {number: self.members[number].host for number in ready}, now)
        elif self.phase == "running" and not self.homeward:
            assert self.view is not None
            # A row of newcomers, one after the other, must not keep the others from their work.
            news = self.members.newcomers() if self._moving else []
            news = news[: len(news) // self.rules.tensor * self.rules.tensor]
            leaving = [n for n in self.members.there(self.view.members) if self.members[n].leaving]
            better = self.dividing.better(self.view) if self._moving and not news and not leaving else None
            if news or leaving or better is not None:
                to_be = None
                if news and not leaving:  # blocks move later: all of this step is kept
                    joined = changed(self.view, (), {n: self.members[n].host for n in news})
                    to_be = replace(joined, epoch=self._epoch + 1)
                elif better is not None and not leaving:
                    to_be = self._moved(self.view, better.view)
                if to_be is not None and not begins:
                    return  # who gets something reads it while a step is computed
                self.phase, self._wished, self._computed = "pausing", True, to_be is not None
                self._moves = to_be is not None and not news
                said = [f"member {number} is ready to join" for number in news]
                said += [f"member {number} leaves" for number in leaving]
                said += [better.why] if better is not None else []
                self._times = _Times(now, now, said)
                readers = news + (gaining(self.view, to_be) if to_be is not None else [])
                if to_be is not None:
                    self._out += [Tell(number, Prepare(to_be, self.view, self.version)) for number in readers]
                for number in self.view.members:
                    self._out.append(Tell(number, Pause(self.view.epoch, "; ".join(said), self._computed)))
                if to_be is not None:
                    self._note("preparing", members=readers, step=self.version)

    def _moved(self, view: View, better: View) -> View | None:
        """The view with other blocks, or members in other stages, if they can move in the middle of a step."""
        return replace(better, epoch=self._epoch + 1) if self._unlike < _TRIES else None

    def _halt(self, why: str, now: float) -> None:
        """Everyone comes out."""
        if self.phase not in ("halting", "pausing"):
            self._times, self._wished, self._computed, self._explained = _Times(now, now), False, False, False
            self._moves = False
        self._times.why += [why] if why else []
        self.phase = "halting"
        for number in self.members.placed():
            member = self.members[number]
            if member.halted is None:
                self._out.append(Tell(number, Halt(member.epoch, why or "a change was announced")))

    def _lose(self, number: int, why: str, now: float, more: bool = False) -> None:
        """A member is lost; `more` are, at the same time, of which the last decides what comes next."""
        if self._over:
            return
        member = self.members.pop(number)
        if member.failed is not None:  # it has said why it ends
            why = f"failed: {member.failed.why}"
        self._note("lost", member=number, why=why, silent=round(now - member.heard, 4))
        if self.phase == "gathering" or member.epoch < 0:
            if self.phase == "gathering" and not (self.rules.patient and member.failed is None):
                failed = member.failed
                self._end(False, f"member {number} {why} before the run began", failed.trace if failed else "")
            return
        if self.view is not None and self.phase in ("running", "pausing") and number not in self.view.members:
            return  # it was about to go: nobody works with it
        if self._everyone_done():
            self._all_done()
            return
        self._halt(f"member {number} {why}", now)
        self._explained = True
        if not more:
            self._judge(now)
            self._decide(now)

    def _everyone_done(self) -> bool:
        """Whether all steps were taken: who is lost then is not missed."""
        if self.view is None or self.phase not in ("running", "pausing"):
            return False
        return self.members.all_done(self.view)

    def _decide(self, now: float) -> None:
        """What comes next, once everyone has come out."""
        if self.phase not in ("halting", "pausing"):
            return
        left = self.members.placed()
        if any(self.members[number].halted is None for number in left):
            return
        if not self._wished and not self._explained and len(left) > 1:
            # A connection has ended between two that live: do they still reach each other?
            self._out += self._probing.ask(left, now)
            return
        self._times.halted = now
        self._aborted += not self._wished
        if self._aborted > self.rules.aborted:
            self._end(False, f"{self._aborted} changes in a row without a step taken; the last: {self._times.why[-1]}")
            return
        news = self.members.hosts()
        stay = [number for number in left if not self.members[number].leaving]
        if len(news) < self.rules.least:
            self._end(False, f"{len(news)} members are left, and the least number is {self.rules.least}")
            return
        if self.view is None:  # nobody has taken a step: begin again with who is there
            base = [n for n in news if n in stay] + [n for n in news if n not in stay]
            self._begin(base, news, now)
            return
        found = newest_whole([self.view, *self._origins], self.members.copies())
        if found is None and self._at_the_start(left):
            self._begin([n for n in news if n in stay] + [n for n in news if n not in stay], news, now)
            return
        if found is None:
            self._end(False, self._unrecoverable())
            return
        before, version, where = found
        gone = [number for number in self.view.members if number not in stay]
        come = {number: host for number, host in news.items() if number not in self.view.members}
        try:
            view = replace(changed(self.view, gone, come), epoch=self._epoch + 1)
        except NobodyLeftError as error:
            self._end(False, str(error))
            return
        others = set(view.members) != set(self.view.members)
        halted = self.members.halted()
        parts = self.rules.keeps_parts
        kept = kept_by(self.view, view, halted, version, parts=parts)
        ready = self._moves and not others and all_is_kept(view, kept, halted)
        view = self.dividing.next(view, may_move=self._wished and (not self._computed or ready), others=others)
        handed = ready and (view.layers, view.members) != (self.view.layers, self.view.members)
        if self._moves:
            self._unlike = 0 if handed else self._unlike + 1
        if not handed:
            kept = kept_by(self.view, view, halted, version, parts=parts) if parts or before is self.view else {}
        self._offer(Adopt(view, before, version, where, kept, handed, cut_of(self.view, kept, halted)), now)

    def _at_the_start(self, numbers: Iterable[int]) -> bool:
        """Whether everybody still has what the run began with: then no copies are needed.

        Before anybody has told of a version, none of those who are left has kept a copy, let alone taken a step.
        """
        versions = {h.version for number in numbers if (h := self.members[number].halted) is not None}
        return self._start is None or {self._start} <= versions <= {None, self._start}

    def _begin(self, numbers: list[int], hosts: Mapping[int, str], now: float) -> None:
        try:
            rules = self.rules
            more = rules.copies, rules.tensor, rules.expert, self._experts
            view = first_view(numbers, hosts, rules.stages, (), *more)
            view = replace(view, layers=self.dividing.layers(view))
        except (NobodyLeftError, ScheduleError) as error:
            self._end(False, str(error))
            return
        self._offer(Adopt(replace(view, epoch=self._epoch + 1), None, 0, {}, {}), now)

    def _unrecoverable(self) -> str:
        assert self.view is not None
        copies = self.members.copies()
        lost = [owner for owner in self.view.members if not holding(owner, self.view.epoch, copies)]
        said = [f"member {owner} (copied to {list(self.view.holders[owner])})" for owner in lost]
        return (
            f"the states of {', '.join(said) or 'some members'} are lost with everyone who had a copy: go on from the "
            "last checkpoint (--resume)"
        )

    def _offer(self, adopt: Adopt, now: float) -> None:
        """Tell everyone what it is to become."""
        view = adopt.view
        self._epoch, self._next, self._adopt, self.phase = view.epoch, view, adopt, "adopting"
        for number in view.members:
            member = self.members[number]
            member.epoch, member.halted, member.ready, member.done = view.epoch, None, None, None
            self._out.append(Tell(number, adopt))

    def _all_ready(self, now: float) -> None:
        view, adopt = self._next, self._adopt
        assert view is not None
        assert adopt is not None
        ready = {number: self.members[number].ready for number in view.members}
        if any(one is None for one in ready.values()):
            return
        for alike, what in [*((each, "state") for each in view.alike), *((e, "experts") for e in view.alike_experts)]:
            told = {n: (one.view, getattr(one, what)) for n in alike if (one := ready[n]) is not None}
            if len(set(told.values())) > 1 or any(digest != view.digest for digest, _ in told.values()):
                self._end(False, f"epoch {view.epoch}: members of one stage have different states or views: {told}")
                return
        resumed = self._start if adopt.before is None else adopt.version
        self._note(
            "change",
            epoch=view.epoch,
            why="; ".join(self._times.why),
            members=list(view.members),
            stages=[list(stage.members) for stage in view.stages],
            layers=list(view.layers),
            planned=self.dividing.reasons(self.view if adopt.before is not None else None, view),
            costs=self.dividing.division.basis,
            version=resumed or 0,
            redone=0 if resumed is None else max(0, self.version - resumed),
            kept=sum(len(adopt.kept.get(number, ())) for stage in view.stages for number in stage.leads),
            shards_moved=_moved(self.view, view),
            halting=round(self._times.halted - self._times.lost, 4),
            adopting=round(now - self._times.halted, 4),
            parts={str(n): {**one.seconds} for n, one in ready.items() if one is not None},
            bytes={str(n): {**one.bytes} for n, one in ready.items() if one is not None and one.bytes},
            view=view.json(),
        )
        # Views may follow each other, and none of them has its copies at their holders before a step was taken.
        self._origins = [] if adopt.before is None or self.view is None else [self.view, *self._origins]
        self.view, self._resumed, self.phase = view, resumed, "running"
        self.version = resumed or 0
        for number in view.members:
            self._out.append(Tell(number, Go(view.epoch)))
        self._out += self.dividing.clocks(view)
        if adopt.before is None:  # everybody began with the same: nobody's copies are needed
            self._part()
        self._consider(now)

    # -- who reaches whom ---------------------------------------------------------------------------------------

    def _suspect(self, now: float) -> None:
        """Where nobody has begun anything new for long, messages between members may not get through."""
        view = {"running": self.view, "pausing": self.view, "adopting": self._next}.get(self.phase)
        if self._probing.overdue(now):
            self._judge(now, late=True)
        elif view is not None and self._probing.may_ask(now):
            there = self.members.there(view.members)
            if len(there) > 1 and all(self._stands(self.members[number], now) for number in there):
                self._note("probe", why=f"nobody has begun anything new for {self.rules.silence:g} s", members=there)
                self._out += self._probing.ask(there, now)

    def _stands(self, member: Member, now: float) -> bool:
        return member.beat is not None and member.beat.seconds + now - member.heard > self.rules.silence

    def _judge(self, now: float, late: bool = False) -> None:
        """Go on without those who are cut off from others, once all who were asked have told.

        Args:
            now: seconds.
            late: who has not told by now is not waited for, and goes.
        """
        gone = None if self._over else self._probing.verdict(self.members, late)
        if gone is None:
            return
        for left, (number, why) in enumerate(reversed(gone)):
            self._out.append(Fence(number, why))
            self._lose(number, why, now, more=left < len(gone) - 1)
        if gone:
            return
        if self.phase == "halting":
            self._explained = True
            self._decide(now)
        else:
            self._probing.all_take_their_time(now)

    # -- the end ------------------------------------------------------------------------------------------------

    def _all_done(self) -> None:
        assert self.view is not None
        there = self.members.there(self.view.members)
        done = [one for number in there if (one := self.members[number].done) is not None]
        if len(done) < len(there):
            return
        told = self.members.digests(self.view)
        if any(len(digests) > 1 for digests in told):
            self._end(False, f"members of one stage ended with different weights: {list(map(sorted, told))}")
            return
        if all(told):  # else a whole stage was lost after its last step, and nobody has its digest
            total = sum(int(next(iter(digests)), 16) for digests in told)
            self._note("digest", weights=f"{total % 2**64:016x}")
        taken = f"{done[0].version} steps were taken"
        self._end(True, f"{taken}, and saved" if self.homeward else f"all {taken}")

    def _end(self, good: bool, why: str, failure: str = "") -> None:
        self.phase = "ended"
        for number in self.members:
            self._out.append(Tell(number, End(0 if good else 1, why)))
        self._out.append(Finish(good, why, failure))

    def _note(self, what: str, **facts: Any) -> None:
        self._out.append(Note(what, facts))


def _moved(before: View | None, after: View) -> int:
    """Virtual shards that have another owner than before."""
    if before is None:
        return 0
    pairs = zip(before.stages, after.stages, strict=True)
    return sum(a != b for old, new in pairs for a, b in zip(old.shards, new.shards, strict=True))
