"""What members and the coordinator tell each other, as values and as JSON. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from resilin.cluster.view import View


class MessageError(ValueError):
    """Something was said that is no message."""


@dataclass(frozen=True, slots=True)
class Hello:
    """A process is there, and getting ready.

    Attributes:
        host: the machine it is on.
    """

    kind: ClassVar[str] = "hello"
    host: str


@dataclass(frozen=True, slots=True)
class Warm:
    """It can be given a place.

    Attributes:
        costs: of every block of the model and of its head, in any unit; empty: it is not divided over stages.
        experts: of a layer, which members may have between them; 0: none.
    """

    kind: ClassVar[str] = "warm"
    costs: tuple[float, ...] = ()
    experts: int = 0


@dataclass(frozen=True, slots=True)
class Beat:
    """It is alive.

    Attributes:
        step: that it works on.
        place: in words.
        doing: in words.
        waits_for: numbers of members.
        seconds: for how long.
        at: the line of its program.
    """

    kind: ClassVar[str] = "beat"
    step: int
    place: str
    doing: str
    waits_for: tuple[int, ...]
    seconds: float
    at: str


@dataclass(frozen=True, slots=True)
class Halted:
    """It has come out of its work, and waits.

    Attributes:
        epoch: of the view that it was in, or was about to be in.
        why: what made it come out.
        version: of the weights in its memory; None: it has none yet; -1: they are between two versions.
        step: the one that `kept` is of; None: it has no states yet.
        copies: (owner, epoch, versions) of all copies in its memory.
        kept: micro-batches of a step whose gradients it has.
        cut: how many micro-batches that step has at its stage, and for how many workers they were cut.
    """

    kind: ClassVar[str] = "halted"
    epoch: int
    why: str
    version: int | None
    step: int | None
    copies: tuple[tuple[int, int, tuple[int, ...]], ...]
    kept: tuple[int, ...]
    cut: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Ready:
    """It is what the view says: connected, its states moved and compared.

    Attributes:
        epoch: of the view.
        view: the view's digest.
        state: digest of what all members of its stage have alike.
        experts: digest of what those have alike who have the same experts.
        seconds: by part what it took; see `Parts`.
        bytes: by part what was read.
    """

    kind: ClassVar[str] = "ready"
    epoch: int
    view: str
    state: str
    experts: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Committed:
    """It keeps a copy of a version of its states: that step was taken.

    Attributes:
        epoch: of the view.
        version: steps taken.
        steps: of this view that `seconds` is the mean of.
        seconds: that its stage takes for one micro-batch, forward and backward.
    """

    kind: ClassVar[str] = "committed"
    epoch: int
    version: int
    steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Computed:
    """All of its micro-batches of a step are computed, and it waits, or is in the exchange where others wait.

    Attributes:
        epoch: of the view.
        step: which.
    """

    kind: ClassVar[str] = "computed"
    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Probed:
    """It has looked whom it reaches.

    Attributes:
        number: of the probe.
        lacking: members that it was asked for and does not reach.
    """

    kind: ClassVar[str] = "probed"
    number: int
    lacking: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Leaving:
    """It was told to go, and will as soon as its states are elsewhere."""

    kind: ClassVar[str] = "leaving"


@dataclass(frozen=True, slots=True)
class Done:
    """It has taken all steps.

    Attributes:
        epoch: of the view.
        version: steps taken.
        digest: of its weights.
        experts: of those that the members of its stage have between them.
    """

    kind: ClassVar[str] = "done"
    epoch: int
    version: int
    digest: str
    experts: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """Its own program failed.

    Attributes:
        step: at which it was.
        why: the error in a line.
        trace: where.
    """

    kind: ClassVar[str] = "failed"
    step: int
    why: str
    trace: str


@dataclass(frozen=True, slots=True)
class Told:
    """Something for the run's log.

    Attributes:
        event: as JSON values.
    """

    kind: ClassVar[str] = "told"
    event: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Halt:
    """Come out at once.

    Attributes:
        epoch: of the view that has ended; who is in another one takes no notice.
        why: in words.
    """

    kind: ClassVar[str] = "halt"
    epoch: int
    why: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Come out, together with all others.

    Attributes:
        epoch: of the view that is about to end.
        why: in words.
        computed: whether after the micro-batches of this step, and before their gradients are exchanged: what was
            computed is kept, and the step is ended in the next view. Else at the next boundary of steps.
    """

    kind: ClassVar[str] = "pause"
    epoch: int
    why: str
    computed: bool = False


@dataclass(frozen=True, slots=True)
class Prepare:
    """Read what you will need: you are about to be in this view, and the others compute a step meanwhile.

    Attributes:
        view: to be.
        before: the present one, each of whose members has its own states.
        version: of the states.
    """

    kind: ClassVar[str] = "prepare"
    view: View
    before: View
    version: int


@dataclass(frozen=True, slots=True)
class Adopt:
    """Become this.

    Attributes:
        view: to be.
        before: the view under which the copies were made; None: everyone begins.
        version: of the copies that all go on from.
        where: by owner in `before` the member whose memory its copy is read from.
        kept: by member the micro-batches of the step after that version that need not be computed again.
        handed: whether these are all, computed in `before`, and gradients of blocks that move, or of stages whose
            members do, are to be handed on.
        cut: by stage, for how many workers that step was cut into micro-batches; (): nothing of it is kept.
    """

    kind: ClassVar[str] = "adopt"
    view: View
    before: View | None
    version: int
    where: Mapping[int, int]
    kept: Mapping[int, tuple[int, ...]]
    handed: bool = False
    cut: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Go:
    """All members of the view are ready: go on.

    Attributes:
        epoch: of the view.
    """

    kind: ClassVar[str] = "go"
    epoch: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Look whether you reach these, and tell.

    Attributes:
        number: of the probe.
        members: all that are asked, the one who is told this among them.
    """

    kind: ClassVar[str] = "probe"
    number: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Isolate:
    """Be cut off, on purpose; see `resilin.cluster.isolation`.

    Attributes:
        side: whom from.
        ends: whether connections are ended first.
        seconds: for how long.
    """

    kind: ClassVar[str] = "isolate"
    side: str
    ends: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Signal:
    """Take this as if the system had sent it to the process.

    Attributes:
        number: SIGTERM: leave the run; SIGINT: the run is to save and end.
    """

    kind: ClassVar[str] = "signal"
    number: int


@dataclass(frozen=True, slots=True)
class End:
    """Your part is over.

    Attributes:
        code: what the process is to exit with.
        why: in words.
    """

    kind: ClassVar[str] = "end"
    code: int
    why: str


Message = (
    Hello | Warm | Beat | Halted | Ready | Committed | Computed | Probed | Leaving | Done | Failed | Told
    | Halt | Pause | Prepare | Adopt | Go | Probe | Isolate | Signal | End
)  # fmt: skip
_KINDS: dict[str, Any] = {
    cls.kind: cls
    for cls in (
        Hello, Warm, Beat, Halted, Ready, Committed, Computed, Probed, Leaving, Done, Failed, Told,
        Halt, Pause, Prepare, Adopt, Go, Probe, Isolate, Signal, End,
    )
}  # fmt: skip


def to_json(message: Message) -> dict[str, Any]:
    """A message as JSON values."""
    if isinstance(message, Adopt):
        return {
            "kind": message.kind,
            "view": message.view.json(),
            "before": None if message.before is None else message.before.json(),
            "version": message.version,
            "where": {str(owner): member for owner, member in message.where.items()},
            "kept": {str(member): list(micros) for member, micros in message.kept.items()},
            "handed": message.handed,
            "cut": list(message.cut),
        }
    if isinstance(message, Prepare):
        views = {"view": message.view.json(), "before": message.before.json()}
        return {"kind": message.kind, **views, "version": message.version}
    return {"kind": message.kind, **asdict(message)}


def of_json(told: Mapping[str, Any]) -> Message:
    """The message that `to_json` gave.

    Raises:
        MessageError: it is none.
    """
    kind = _KINDS.get(str(told.get("kind")))
    if kind is None:
        raise MessageError(f"this is no message: {told!r:.200}")
    values = {key: value for key, value in told.items() if key != "kind"}
    if set(values) != {each.name for each in fields(kind)}:
        raise MessageError(f"a message {kind.kind!r} has {sorted(values)}")
    try:
        if kind is Adopt:
            before = values["before"]
            return Adopt(
                View.of_json(values["view"]),
                None if before is None else View.of_json(before),
                int(values["version"]),
                {int(owner): int(member) for owner, member in values["where"].items()},
                {int(member): tuple(map(int, micros)) for member, micros in values["kept"].items()},
                bool(values["handed"]),
                tuple(map(int, values["cut"])),
            )
        if kind is Prepare:
            return Prepare(View.of_json(values["view"]), View.of_json(values["before"]), int(values["version"]))
        if kind is Halted:
            values["copies"] = tuple((int(o), int(e), tuple(map(int, v))) for o, e, v in values["copies"])
        found: Message = kind(**{key: _tuple(value) for key, value in values.items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise MessageError(f"a message {kind.kind!r} cannot be read: {error}") from None
    return found


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
