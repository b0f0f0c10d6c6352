"""Changes of an elastic run as a story each: who was lost or came, what was decided, and where the seconds went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PARTS = ("detect", "halt", "edit", "replan", "restore", "migrate", "verify", "wait", "redo")
"""From the last sign of life of whoever is lost to the first step that all take together again."""
_OF_MEMBERS = {
    "groups": "edit",
    "engine": "edit",
    "plan": "replan",
    "restore": "restore",
    "migrate": "migrate",
    "load": "verify",
    "verify": "verify",
}


@dataclass
class Change:
    """One epoch, and how it came about.

    Attributes:
        time: when all went on, seconds since 1970.
        facts: of the coordinator's decision.
        told: what was said before it: (what, facts) of events.
        before: members of the epoch before, in order; empty: there was none.
        last_step: when the last step before it was done; None: there was none, or nobody knows.
        view_before: of the epoch before, as JSON values; None: there was none, or it was not told.
    """

    time: float
    facts: Mapping[str, Any]
    told: Sequence[tuple[str, Mapping[str, Any]]] = ()
    before: Sequence[int] = ()
    last_step: float | None = None
    view_before: Mapping[str, Any] | None = None

    def members(self, what: str) -> list[int]:
        """Whom something was said of."""
        return list(dict.fromkeys(int(facts["member"]) for word, facts in self.told if word == what))

    @property
    def kind(self) -> str:
        """What it was for, in a word."""
        if not self.facts.get("epoch"):
            return "begin"
        after = set(self.facts.get("members", ()))
        if self.members("lost"):
            return "loss"
        if set(self.before) - after:
            return "leave"
        if after - set(self.before):
            return "join"
        before, now = _stages(self.view_before), _stages(self.facts.get("view"))
        return "move" if before and now and before != now else "other"

    @property
    def told_anew(self) -> bool:
        """Whether a step was cut short, or states went back: then the next step is (in part) one more time."""
        return self.kind in ("loss", "other") or bool(self.facts.get("redone"))

    def slowest(self) -> tuple[str, Mapping[str, float]] | None:
        """The member that took longest to be what it was told, and its parts."""
        parts: Mapping[str, Mapping[str, float]] = self.facts.get("parts") or {}
        number = max(parts, key=lambda one: sum(parts[one].values()), default=None)
        return None if number is None else (number, parts[number])

    def timeline(self, next_step: float | None) -> list[dict[str, Any]]:
        """The parts, in order, as JSON values.

        Args:
            next_step: when the first step after it was done.
        """
        seconds = dict.fromkeys(PARTS, 0.0)
        silent = [float(facts["silent"]) for what, facts in self.told if what == "lost" and "silent" in facts]
        seconds["detect"] = max(silent, default=0.0)
        seconds["halt"] = float(self.facts.get("halting", 0.0))
        adopting = float(self.facts.get("adopting", 0.0))
        if (slowest := self.slowest()) is not None:
            for part, took in slowest[1].items():
                seconds[_OF_MEMBERS.get(part, "wait")] += took
            adopting -= sum(slowest[1].values())
        seconds["wait"] += max(0.0, adopting)
        if next_step is not None:
            seconds["redo"] = max(0.0, next_step - self.time)
        return [{"part": part, "seconds": round(took, 5)} for part, took in seconds.items() if took > 0]

    def as_json(self, next_step: float | None, usual: float | None) -> dict[str, Any]:
        """For the page.

        Args:
            next_step: when the first step after it was done; None: not yet.
            usual: seconds that a step took before.
        """
        after = [int(number) for number in self.facts.get("members", ())]
        slowest = self.slowest()
        gap = None if next_step is None or self.last_step is None else round(max(0.0, next_step - self.last_step), 4)
        return {
            "epoch": self.facts.get("epoch"),
            "time": self.time,
            "kind": self.kind,
            "why": self.facts.get("why", ""),
            "lost": [{"member": f["member"], "why": f.get("why", "")} for what, f in self.told if what == "lost"],
            "came": [number for number in after if number not in self.before] if self.before else [],
            "went": [number for number in self.before if number not in after],
            "before": list(self.before),
            "after": after,
            "stages_before": _stages(self.view_before),
            "stages_after": _stages(self.facts.get("view")),
            "step": self.facts.get("version"),
            "redone": self.facts.get("redone"),
            "kept": self.facts.get("kept"),
            "shards_moved": self.facts.get("shards_moved"),
            "timeline": self.timeline(next_step),
            "cut_short": self.told_anew,
            "planned": [_reason(one) for one in self.facts.get("planned") or ()],
            "slowest": None if slowest is None else int(slowest[0]),
            "parts": self.facts.get("parts") or {},
            "bytes": self.facts.get("bytes") or {},
            "gap": gap,
            "usual": usual,
        }


def _reason(told: Mapping[str, Any]) -> dict[str, Any]:
    """What was decided of one axis, and why; times of a step in steps as they were."""
    seconds = told.get("seconds") or {}
    words = {name: str(told.get(name, "")) for name in ("axis", "decision", "why")}
    return {**words, "before": seconds.get("before"), "after": seconds.get("after")}


def _stages(view: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A view's members by stage, and which blocks they have."""
    if view is None:
        return []
    layers = view.get("layers") or ()
    return [
        {"members": list(stage["members"]), "layers": [layers[place], layers[place + 1]] if layers else None}
        for place, stage in enumerate(view["stages"])
    ]


@dataclass
class Changes:
    """All changes of a run so far.

    Attributes:
        found: in order.
        told: what was said since the last one.
        view: the newest view, as JSON values; None: none was told.
    """

    found: list[Change] = field(default_factory=list)
    told: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    view: Mapping[str, Any] | None = None

    def add(self, time: float, what: str, facts: Mapping[str, Any], last_step: float | None) -> Change | None:
        """An event `cluster`; gives the change if it is one."""
        if what != "change":
            if what in ("lost", "leaving", "ready"):
                self.told.append((what, facts))
            return None
        # Another launch begins with epoch 0, and with new numbers of members.
        last = self.found[-1] if self.found and facts.get("epoch") else None
        before = tuple(last.facts.get("members", ())) if last is not None else ()
        view = last.facts.get("view") if last is not None else None
        change = Change(time, facts, tuple(self.told), before, last_step, view)
        self.told.clear()
        self.found.append(change)
        self.view = facts.get("view")
        return change
