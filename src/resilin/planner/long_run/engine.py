"""A run played against a trace: from event to event, in closed form between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from resilin.planner.long_run.course import Course
from resilin.planner.long_run.outcome import Outcome
from resilin.planner.long_run.trace import EVICT, SLOW, Trace
from resilin.planner.long_run.way import Stop, Way

_EARLIER, _SMALL = 1e-12, 1e-9


@dataclass(slots=True)
class Diary:
    """What a run was at, when: for pictures. A stretch lasts until the next one begins.

    Attributes:
        stretches: (second, "work", "stop" or "stand", speed, machines there).
        saves: seconds at which checkpoints were complete.
        back: (second of a loss, second whose state the run went back to).
    """

    stretches: list[tuple[float, str, float, int]] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)
    back: list[tuple[float, float]] = field(default_factory=list)


def play(way: Way, trace: Trace, course: Course, spares: int = 0, diary: Diary | None = None) -> Outcome:
    """What becomes of a run.

    The trace's last `spares` machines wait until one that computes is lost; whoever comes back takes an empty seat, or
    waits in turn. A machine that fails while it is gone stays gone until the later of both ends. A run whose trace ends
    before it goes on as if nothing happened any more: see that it is long enough.

    Args:
        way: a fresh one.
        trace: of all machines.
        course: of the run.
        spares: of the machines.
        diary: is filled in, where one is given.
    """
    return _Player(way, trace, course, spares, diary).play()


class _Player:
    """The state of a run. Fields are few and plain: a trace has a million events."""

    def __init__(self, way: Way, trace: Trace, course: Course, spares: int, diary: Diary | None) -> None:
        if not 0 <= spares < trace.machines:
            raise ValueError(f"of {trace.machines} machines {spares} cannot be spare")
        self.way, self.trace, self.course, self.diary = way, trace, course, diary
        seats = trace.machines - spares
        self.seat_of = [*range(seats), *[-1] * spares]
        self.machine_in = list(range(seats))
        self.spare = list(range(trace.machines - 1, seats - 1, -1))
        self.empties = 0
        self.down = [0] * trace.machines
        self.slow: dict[int, list[float]] = {}
        self.present = trace.machines
        self.now = self.until = 0.0
        self.steps = self.saved = self.at = 0.0  # `at`: seconds since the last checkpoint was complete
        self.working = self.saving = self.stopped = self.standing = self.machine_seconds = self.busy = 0.0
        self.slower = self.lost = 0.0
        self.losses = self.restarts = self.events = 0
        self.seats = seats

    def play(self) -> Outcome:
        """From the first event to the end."""
        times, order, ends = _merged(self.trace)
        kinds, machines = self.trace.kind_E.tolist(), self.trace.machine_E.tolist()
        notices, factors = self.trace.notice_E.tolist(), self.trace.factor_E.tolist()
        count, index, limit = len(times), 0, self.course.limit
        finished = False
        self._note()
        while index < count and not finished:
            time = times[index]
            if time > limit:
                break
            finished = self._advance(time)
            if finished:
                break
            event = order[index]
            kind, machine = kinds[event], machines[event]
            index += 1
            self.events += 1
            if kind == SLOW:
                self._slows(machine, factors[event], ends[index - 1])
            elif ends[index - 1]:
                self._comes(machine)
            else:
                gone = [machine]
                while index < count and times[index] == time and not ends[index] and kinds[order[index]] == kind:
                    gone.append(machines[order[index]])
                    index += 1
                    self.events += 1
                self._loses(gone, notices[event] if kind == EVICT else 0.0)
            self._note()
        finished = finished or self._advance(limit)
        return self._outcome(finished)

    def _advance(self, time: float) -> bool:
        """To a time, or to the end of the run if that comes first."""
        begin, now = self.now, self.now
        if now < self.until:
            stop = min(time, self.until)
            self.stopped += stop - now
            now = stop
        speed, course = self.way.speed, self.course
        left = time - now
        done = False
        if left <= 0:
            pass
        elif speed <= 0:
            if left == math.inf:
                left = 0.0  # nothing will happen any more: it is given up where it stands
            self.standing += left
            now += left
        else:
            interval, cost = course.interval, course.checkpoint_seconds
            cycle = interval + cost
            pace = speed / course.step_seconds
            at = self.at
            head, offset = (
                (at, 0.0) if at < interval else (0.0, cycle - at)
            )  # the second: in the middle of a checkpoint
            work = (course.steps - self.steps) / pace
            passed = max(math.ceil((head + work) / interval * (1 - _EARLIER)) - 1, 0) if interval < math.inf else 0
            wall = offset + work + passed * cost
            if wall <= left:
                done = True
                self.working += work
                self.saving += offset + passed * cost
                self.slower += work * (1 - speed)
                self.busy += work * speed * self.way.heat
                self.steps = course.steps
                self._save(now, offset if offset else None, passed, head, cycle)
                now += wall
            else:
                total = at + left
                cycles = int(total // cycle)  # 0 where there are no checkpoints, and infinity times 0 would be none
                rest, done_in = (total - cycles * cycle, cycles * interval) if cycles else (total, 0.0)
                inside = min(rest, interval)
                work = done_in + inside - min(at, interval)
                self.working += work
                self.saving += left - work
                self.slower += work * (1 - speed)
                self.busy += work * speed * self.way.heat
                self.steps += work * pace
                if cycles:
                    self.saved = self.steps - inside * pace
                    self._save(now, cycle - at, cycles - 1, 0.0, cycle)
                self.at = rest
                now = time
        self.machine_seconds += (now - begin) * self.present
        self.now = now
        return done

    def _save(self, now: float, first: float | None, more: int, head: float, cycle: float) -> None:
        if self.diary is None:
            return
        if first is not None:
            now += first
            self.diary.saves.append(now)
        self.diary.saves += [now - head + cycle * number for number in range(1, more + 1)]

    def _loses(self, machines: list[int], noticed: float) -> None:
        empty: list[int] = []
        replaced: list[int] = []
        for machine in machines:
            self.down[machine] += 1
            if self.down[machine] > 1:
                continue
            self.present -= 1
            seat = self.seat_of[machine]
            if seat < 0:
                self.spare.remove(machine)
                continue
            self.seat_of[machine] = -1
            (empty if len(replaced) >= len(self.spare) else replaced).append(seat)
        if not empty and not replaced:
            return
        self.losses += 1
        stops = []
        if empty:
            self.empties += len(empty)
            for seat in empty:
                self.machine_in[seat] = -1
            stops.append(self.way.lose(empty, noticed))
        if replaced:
            stops.append(self.way.replace(replaced, noticed))
            for seat in replaced:
                self._sits(self.spare.pop(), seat)
        self._stop(stops)

    def _comes(self, machine: int) -> None:
        self.down[machine] -= 1
        if self.down[machine]:
            return
        self.present += 1
        if not self.empties:
            self.spare.append(machine)
            return
        seat, stop = self.way.come()
        self.empties -= 1
        self._sits(machine, seat)
        self._stop([stop])

    def _sits(self, machine: int, seat: int) -> None:
        self.seat_of[machine], self.machine_in[seat] = seat, machine
        if machine in self.slow:
            self.way.slow(seat, max(self.slow[machine]))

    def _slows(self, machine: int, factor: float, ends: bool) -> None:
        factors = self.slow.setdefault(machine, [])
        if ends:
            factors.remove(factor)
        else:
            factors.append(factor)
        most = max(factors, default=1.0)
        if not factors:
            del self.slow[machine]
        if self.seat_of[machine] >= 0:
            self.way.slow(self.seat_of[machine], most)

    def _stop(self, stops: list[Stop]) -> None:
        course = self.course
        if any(stop.back for stop in stops):
            self.restarts += 1
            if self.diary is not None and self.steps > self.saved:
                self.diary.back.append((self.now, self.diary.saves[-1] if self.diary.saves else 0.0))
            self.lost += self.steps - self.saved
            self.steps, self.at = self.saved, 0.0
        else:
            redo = max(stop.redo for stop in stops)
            if redo and self.steps > self.saved:
                under_way = self.steps - math.floor(self.steps + _SMALL)
                lost = max(min(redo * under_way, self.steps - self.saved), 0.0)
                self.lost += lost
                self.steps -= lost
            if any(stop.saves for stop in stops):
                self.saved, self.at = self.steps, 0.0
        seconds = max(stop.seconds for stop in stops)
        if seconds:
            self.until = max(self.until, self.now + seconds)
            if self.at >= course.interval:  # the checkpoint that was being written is begun again
                self.at = course.interval

    def _note(self) -> None:
        if self.diary is None:
            return
        kind = "stop" if self.now < self.until else "work" if self.way.speed > 0 else "stand"
        self.diary.stretches.append((self.now, kind, self.way.speed, self.present))
        if kind == "stop":
            after = "work" if self.way.speed > 0 else "stand"
            self.diary.stretches.append((self.until, after, self.way.speed, self.present))

    def _outcome(self, finished: bool) -> Outcome:
        step = self.course.step_seconds
        return Outcome(
            finished=finished,
            seconds=self.now,
            steps=self.steps,
            useful=self.steps * step,
            slower=self.slower,
            again=self.lost * step,
            saving=self.saving,
            stopped=self.stopped,
            standing=self.standing,
            losses=self.losses,
            restarts=self.restarts,
            events=self.events,
            machine_seconds=self.machine_seconds,
            busy_seconds=self.busy * self.seats,
        )


def _merged(trace: Trace) -> tuple[list[float], list[int], list[bool]]:
    """(time, event, whether it is its end) of all beginnings and ends, ascending; at one time beginnings come first."""
    count = len(trace)
    time_M = np.concatenate([trace.time_E, trace.until_E])
    event_M = np.concatenate([np.arange(count), np.arange(count)])
    end_M = np.repeat([False, True], count)
    rank_M = np.where(end_M, 3, trace.kind_E[event_M])
    order = np.lexsort((event_M, rank_M, time_M))
    order = order[np.isfinite(time_M[order])]
    return time_M[order].tolist(), event_M[order].tolist(), end_M[order].tolist()
