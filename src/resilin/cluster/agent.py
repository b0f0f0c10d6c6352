"""A member's connection to the coordinator. Its thread hears and beats; the main thread says and waits."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from resilin.cluster.addresses import guard, own_address
from resilin.cluster.handshake import prove
from resilin.cluster.isolation import SIDES, Isolation
from resilin.cluster.parts import Parts
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
    Isolate,
    Leaving,
    Message,
    MessageError,
    Pause,
    Prepare,
    Probe,
    Probed,
    Ready,
    Signal,
    Told,
    Warm,
    of_json,
    to_json,
)
from resilin.cluster.pulse import begin
from resilin.cluster.reach import lacking
from resilin.cluster.scheduling import answer_at_once
from resilin.cluster.sockets import At, at_of
from resilin.cluster.starter import Door
from resilin.cluster.watch import line_of
from resilin.cluster.wire import Wire
from resilin.config import UserError
from resilin.parallel.activity import now

_BEAT = 0.5
_ORPHANED = 3  # the exit code of a member without its coordinator


class HaltedError(RuntimeError):
    """This member was told to come out of what it was doing."""


class EndedError(SystemExit):
    """This member's part is over."""


class Agent:
    """Speaks for a member.

    Args:
        door: of the job.
        number: of this member, given once and never again.
        store: of the job.
        host: the name of this machine.
        timeout: seconds that a member waits for another.
        silence: seconds after which a coordinator that is not reached any more is given up.
        address: at which others reach this member; "": that of its way to the coordinator.

    Attributes:
        pausing: whether everyone is to come out at the next boundary of steps.
        stopping: whether everyone is to come out once its micro-batches are computed.
        leaves: whether this member was told to go.
        address: at which others reach this member.

    Raises:
        HandshakeError: whoever listens there does not know the job's secret.
        OSError: nobody does.
    """

    def __init__(
        self, door: Door, number: int, store: Any, host: str, timeout: float, silence: float = 10.0, address: str = ""
    ) -> None:
        self.number, self.secret, self.store, self.timeout = number, door.secret, store, timeout
        self.pausing = self.stopping = self.leaves = False
        connection = socket.create_connection((door.host, door.port), timeout)
        prove(connection, door.secret)
        guard(connection, max(silence, 1.0))
        self.address = address or own_address(connection)
        self._silence = silence
        self._isolation = Isolation([at_of(connection.getpeername()), ("127.0.0.1", store.port)])
        self._wire = Wire(connection)
        pulse = begin()
        self._wire.say({"number": number, "pulse": [] if pulse is None else pulse.json()})
        self._main = threading.get_ident()
        self._changed = threading.Condition()
        self._adopt: Adopt | None = None
        self._prepare: Prepare | None = None
        self._epoch = -1  # of the last Adopt that the main thread has taken
        self._computed = -1  # the last step whose micro-batches are all computed
        self._halt: tuple[int, str] | None = None
        self._go = -1
        self._ended: End | None = None
        self._closed = False
        self._leave = threading.Event()
        self._sever: Callable[[str], None] = lambda why: None
        self._where: Callable[[int], At] = lambda member: ("", 0)
        self._read: Callable[[Prepare], object] = lambda told: None
        self._say(Hello(host))
        threading.Thread(target=self._hear, name="resilin-agent", daemon=True).start()
        threading.Thread(target=self._beat, name="resilin-beat", daemon=True).start()

    def _say(self, message: Message) -> None:
        self._wire.say(to_json(message))

    # -- what the main thread says ------------------------------------------------------------------------------

    def on_halt(self, sever: Callable[[str], None]) -> None:
        """What is called when the main thread has to come out, from another thread."""
        self._sever = sever

    def on_probe(self, where: Callable[[int], At]) -> None:
        """What tells where a member listens, when it is asked whom this one reaches; called in another thread."""
        self._where = where

    def on_prepare(self, read: Callable[[Prepare], object]) -> None:
        """What is called, by the hearing thread, when this member, which has a place, is about to get more to do."""
        self._read = read

    def warm(
        self, costs: Sequence[float] = (), experts: int = 0, prepare: Callable[[Prepare], None] = lambda told: None
    ) -> Adopt:
        """Ready for a place; returns once there is one.

        Args:
            costs: see `Warm`.
            experts: likewise.
            prepare: called when there is about to be one.
        """
        self._say(Warm(tuple(costs), experts))
        return self._await_place(prepare)

    def halted(
        self,
        error: BaseException,
        version: int | None,
        step: int | None,
        copies: Mapping[tuple[int, int], Sequence[int]],
        kept: Sequence[int],
        cut: tuple[int, int] = (0, 0),
        prepare: Callable[[Prepare], None] = lambda told: None,
    ) -> Adopt:
        """Come out of the work; returns once there is another place.

        Args:
            error: what made it come out.
            version: of the weights; None: there are none yet; -1: they are between two versions.
            step: the one that `kept` is of; None: it has no states yet.
            copies: by owner and epoch the versions in its memory.
            kept: micro-batches of that step whose gradients it has.
            cut: see `Halted`.
            prepare: as for `warm`, where this member is left over for a while.
        """
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
        listed = tuple((owner, epoch, tuple(versions)) for (owner, epoch), versions in copies.items())
        self._say(Halted(self._epoch, f"{type(error).__name__}: {why:.160}", version, step, listed, tuple(kept), cut))
        return self._await_place(prepare)

    def _await_place(self, prepare: Callable[[Prepare], None]) -> Adopt:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._ended is not None or self._newer() is not None or self._prepare is not None
                )
                self._leave_if_ended()
                if (found := self._newer()) is not None:
                    self._epoch, self.pausing, self.stopping, self._prepare = found.view.epoch, False, False, None
                    self._computed = -1
                    return found
                told, self._prepare = self._prepare, None
            assert told is not None
            prepare(told)

    @property
    def awaited(self) -> bool:
        """Whether there is a place for this member, which it has not taken yet."""
        return self._newer() is not None

    def _newer(self) -> Adopt | None:
        adopt = self._adopt
        return adopt if adopt is not None and adopt.view.epoch > self._epoch else None

    def adopted(self, adopt: Adopt, digests: tuple[str, str], parts: Parts) -> None:
        """This member is what it was told to be; returns once all are.

        Args:
            adopt: what it was told.
            digests: `Ready.state` and `Ready.experts`.
            parts: what it took.

        Raises:
            HaltedError: something else has changed.
        """
        seconds = {part: round(took, 5) for part, took in parts.seconds.items()}
        self._say(Ready(adopt.view.epoch, adopt.view.digest, *digests, seconds, parts.bytes))
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended is not None or self._go >= adopt.view.epoch or self._halted_now() is not None
            )
            self._leave_if_ended()
            if self._go < adopt.view.epoch:
                raise HaltedError(self._halted_now() or "")

    def _halted_now(self) -> str | None:
        return self._halt[1] if self._halt is not None and self._halt[0] == self._epoch else None

    def check(self) -> None:
        """Come out, if told to.

        Raises:
            HaltedError: so it was.
        """
        with self._changed:
            self._leave_if_ended()
            if (why := self._halted_now()) is not None:
                raise HaltedError(why)

    def committed(self, version: int, steps: int = 0, seconds: float = 0.0) -> None:
        """A copy of this version is kept; see `Committed`."""
        self._say(Committed(self._epoch, version, steps, round(seconds, 7)))

    def computed(self, step: int) -> None:
        """All micro-batches of a step are computed; where all are to come out then, returns never.

        Raises:
            HaltedError: all have come so far.
        """
        self._computed = step  # whoever is told to come out a moment later has said so
        if not self.stopping:
            return
        self._say(Computed(self._epoch, step))
        with self._changed:
            self._changed.wait_for(lambda: self._ended is not None or self._halted_now() is not None)
            self._leave_if_ended()
            raise HaltedError(self._halted_now() or "")

    def done(self, version: int, digest: str, experts: str = "") -> None:
        """All steps were taken; returns once all members are so far. See `Done`.

        Raises:
            HaltedError: something has changed before that.
        """
        self._say(Done(self._epoch, version, digest, experts))
        with self._changed:
            self._changed.wait_for(lambda: self._ended is not None or self._halted_now() is not None)
            if self._ended is None:
                raise HaltedError(self._halted_now() or "")

    def leaving(self) -> None:
        """Go away as soon as this member's states are elsewhere. May be called by a handler of signals."""
        self.leaves = True
        self._leave.set()  # the beating thread says it: this one may be in the middle of saying something

    def failed(self, error: BaseException) -> None:
        """This member's own program has failed. What a user can mend is told without a traceback, as in one process."""
        if isinstance(error, UserError) and not os.environ.get("RESILIN_TRACEBACK"):
            self._say(Failed(now.step, str(error), ""))
            return
        why = (str(error).strip().splitlines() or [""])[0]
        trace = "".join(traceback.format_exception(error))
        self._say(Failed(now.step, f"{type(error).__name__}: {why:.200}", trace[-20_000:]))

    def tell(self, event: Mapping[str, Any]) -> None:
        """Something for the run's log."""
        self._say(Told(event))

    def close(self) -> None:
        """End the connection."""
        self._closed = True
        self._wire.close()

    def _leave_if_ended(self) -> None:
        if self._ended is not None:
            sys.stderr.write(f"member {self.number} ends: {self._ended.why}\n")
            raise EndedError(self._ended.code)

    # -- the other threads --------------------------------------------------------------------------------------

    def _hear(self) -> None:
        answer_at_once()
        while (told := self._wire.hear()) is not None:
            try:
                message = of_json(told)
            except MessageError as error:
                sys.stderr.write(f"member {self.number}: {error}\n")
                continue
            self._take(message)
        if not self._closed and self._ended is None:
            # Whoever does not hear what is decided must not train on.
            os.write(2, f"member {self.number} has lost its coordinator, and ends\n".encode())
            os._exit(_ORPHANED)

    def _take(self, message: Message) -> None:
        sever: str | None = None
        prepare: Prepare | None = None
        with self._changed:
            if isinstance(message, Adopt):
                self._adopt = message
            elif isinstance(message, Go):
                self._go = message.epoch
            elif isinstance(message, Halt):
                self._halt = message.epoch, message.why
                if message.epoch == self._epoch:
                    sever = message.why
            elif isinstance(message, Pause):
                here = message.epoch == self._epoch
                self.pausing, self.stopping = here and not message.computed, here and message.computed
                if self.stopping and self._computed >= 0:  # in the exchange it would wait for those who wait
                    self._say(Computed(self._epoch, self._computed))
            elif isinstance(message, Prepare) and self.number in message.before.members:
                prepare = message
            elif isinstance(message, Prepare):
                self._prepare = message
            elif isinstance(message, Signal):
                os.kill(os.getpid(), message.number)
            elif isinstance(message, Probe):
                threading.Thread(target=self._probe, args=(message,), name="resilin-probe", daemon=True).start()
            elif isinstance(message, Isolate) and message.side in SIDES:
                self._isolation.begin(message.side, message.ends, message.seconds)
            elif isinstance(message, End):
                self._ended = message
                sever = message.why
            self._changed.notify_all()
        if sever is not None:
            self._sever(sever)
        if prepare is not None:
            self._read(prepare)

    def _probe(self, asked: Probe) -> None:
        others = [number for number in asked.members if number != self.number]
        self._say(Probed(asked.number, lacking(others, self._where, self.secret, self._silence)))

    def _beat(self) -> None:
        answer_at_once()
        while not self._closed and self._ended is None:
            activity = now.activity
            at = line_of(sys._current_frames().get(self._main))
            seconds = round(time.monotonic() - activity.since, 2)
            waits = tuple(rank for rank in activity.waits_for)
            self._say(Beat(now.step, now.place, str(activity), waits, seconds, at))
            if self._leave.wait(_BEAT):
                self._leave.clear()
                self._say(Leaving())
