"""From what a user asks of `resilin cluster plan` to what each way to live with a loss would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from resilin.cluster.axes import Clocks, Layers, Machine, Pipeline, PlanError, Rules, chosen_clocks, clocks_hook
from resilin.cluster.axes.of_decoder import layers_of, measured
from resilin.cluster.axes.policies import Policy, policies
from resilin.config import UserError, load_settings
from resilin.parallel.pipeline import ScheduleError, Split, Time, Timeline, balanced
from resilin.run.folder import RunFolder
from resilin.run.model_layout import outline_at
from resilin.run.settings import RunSettings

TOKENS = 1024
"""Of a row, where nothing says how many there are: only attention's part of the costs depends on it."""


@dataclass(frozen=True, slots=True)
class ChangeRequest:
    """The options of `resilin cluster plan`.

    Attributes:
        file: a run's settings, its folder, or a Hugging Face folder, whose decoder gives layers their costs.
        overrides: of the settings.
        stages: of the pipeline; this and what follows 0: as a run's settings say, else 4 stages of 4 replicas, 4
            micro-batches for each, and `TOKENS`.
        replicas: of each.
        micros: micro-batches of a step, of all replicas together.
        micro: slots of each.
        tokens: of a slot.
        layers: how many alike, or the cost of each; "" as the decoder has.
        head: the cost of what follows the last layer; "" as the decoder has, or nothing.
        tflops: that a member computes a second, in 10^12; 0: not known.
        lost: "stage" or "stage.replica" each, counted from 0.
        measured: times of a run's passes, of `parallel.trace`, with the layers that `counts` says.
        counts: layers of each stage now; () is the best split.
        memory: GiB of a member; 0: enough.
        bandwidth: GB a second that a member sends; 0: layers move in no time.
        clocks: that can be set, the usual one first; ().
        hook: "module:function" that is handed the clocks of the last way; "": none.
        fixed: the share of the time that no clock shortens.
        horizon: see `Rules`.
    """

    file: Path | None = None
    overrides: tuple[str, ...] = ()
    stages: int = 0
    replicas: int = 0
    micros: int = 0
    micro: int = 0
    tokens: int = 0
    layers: str = ""
    head: str = ""
    tflops: float = 0.0
    lost: tuple[str, ...] = ()
    measured: Path | None = None
    counts: tuple[int, ...] = ()
    memory: float = 0.0
    bandwidth: float = 0.0
    clocks: tuple[Fraction, ...] = ()
    hook: str = ""
    fixed: Fraction = Fraction(0)
    horizon: int = 50


@dataclass(frozen=True, slots=True)
class Forecast:
    """What was found.

    Attributes:
        pipeline: before the loss.
        policies: see `resilin.cluster.axes.policies`.
        unit: of the times.
    """

    pipeline: Pipeline
    policies: tuple[Policy, ...]
    unit: str

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "members": [list(stage) for stage in self.pipeline.members],
            "layers": list(self.pipeline.split.bounds),
            "unit": self.unit,
            "policies": [
                {
                    "name": one.name,
                    "slots": one.slots,
                    "seconds": float(one.seconds),
                    "throughput": float(one.throughput),
                    "decision": None if one.decision is None else one.decision.json(),
                }
                for one in self.policies
            ],
        }


def forecast(request: ChangeRequest) -> Forecast:
    """What each way would cost.

    Raises:
        UserError: what was asked for cannot be.
    """
    try:
        return _forecast(request)
    except (PlanError, ScheduleError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(str(error)) from error


def _settled(request: ChangeRequest) -> ChangeRequest:
    """With what the run's settings say wherever nothing else was asked for."""
    settings = _settings(request)
    stages, replicas, micros, micro, tokens = 4, 4, 0, 0, TOKENS
    if settings is not None:
        parallel, train = settings.parallel, settings.train
        stages = parallel.pipeline if isinstance(parallel.pipeline, int) else stages
        if isinstance(parallel.data, int):
            replicas = parallel.data
        elif parallel.workers:
            replicas = max(parallel.workers // stages, 1)
        micro = train.micro_batch_size
        micros = -(-train.batch_size // micro) if micro else 0
        tokens = getattr(settings.source, "sequence_length", None) or tokens
    replicas = request.replicas or replicas
    return replace(
        request,
        stages=request.stages or stages,
        replicas=replicas,
        micros=request.micros or micros or 4 * replicas,
        micro=request.micro or micro or max(replicas - 1, 1),  # can be cut for one replica less
        tokens=request.tokens or tokens,
        counts=request.counts or (settings.parallel.layers if settings is not None and not request.stages else ()),
    )


def _settings(request: ChangeRequest) -> RunSettings | None:
    if request.file is None:
        return None
    if request.file.suffix == ".toml":
        return load_settings(RunSettings, request.file, request.overrides)
    return RunFolder(request.file).settings() if (request.file / "settings.toml").exists() else None


def _forecast(request: ChangeRequest) -> Forecast:
    request = _settled(request)
    layers, unit = _layers(request)
    split = _split(request, layers)
    if request.measured is not None:
        layers, unit = measured(layers, _timeline(request.measured), split), "seconds"
    members = [range(stage * request.replicas, (stage + 1) * request.replicas) for stage in range(request.stages)]
    pipeline = Pipeline.of(split, members, request.micros, request.micro)
    if unit == _RELATIVE:
        layers = _scaled(layers, 1 / float(policies(pipeline, {}, layers)[0].seconds))
        if request.bandwidth:
            raise UserError(
                "--bandwidth tells how many seconds it takes to move layers, and a step's seconds are not known: give "
                "--tflops with a decoder, --measured, or --layers with the seconds of each"
            )
    machine = Machine(
        memory=request.memory * 2**30 or None,
        bandwidth=request.bandwidth * 1e9 or None,
        clocks=Clocks(tuple(sorted(request.clocks)), request.clocks[0], request.fixed) if request.clocks else None,
    )
    hook = clocks_hook(request.hook) if request.hook else None
    if hook is not None and machine.clocks is None:
        raise UserError("--clocks-hook: there are no clocks to hand over; name those that can be set with --clocks")
    found = policies(pipeline, _lost(request.lost), layers, machine, Rules(horizon=request.horizon))
    decision = found[-1].decision
    if hook is not None and machine.clocks is not None and decision is not None:
        hook(chosen_clocks(decision, machine.clocks))
    return Forecast(pipeline, found, unit)


_RELATIVE = "relative to the step before the loss"


def _layers(request: ChangeRequest) -> tuple[Layers, str]:
    found, unit = Layers((1,) * (8 * request.stages)), _RELATIVE
    if request.file is not None:
        decoder = outline_at(request.file, list(request.overrides))
        found = layers_of(decoder, request.micro, request.tokens, request.tflops * 1e12 or 1.0)
        unit = "seconds" if request.tflops else unit
    if request.layers:
        costs = numbers_of("--layers", request.layers)
        alike = len(costs) == 1 and costs[0].denominator == 1
        found, unit = Layers((1,) * int(costs[0]) if alike else costs), unit if alike else "as --layers gives them"
    if request.head:
        found = replace(found, head=numbers_of("--head", request.head)[0])
    return found, unit


def _split(request: ChangeRequest, layers: Layers) -> Split:
    if not request.counts:
        return balanced(
            layers.seconds, request.stages, layers.embedding, layers.head, allowed=lambda _, first, end: end > first
        )
    bounds = [0]
    for count in request.counts:
        bounds.append(bounds[-1] + count)
    if len(request.counts) != request.stages or bounds[-1] != len(layers.seconds):
        raise UserError(
            f"parallel.layers names {len(request.counts)} stages with {bounds[-1]} layers; there are {request.stages} "
            f"stages and {len(layers.seconds)} layers"
        )
    return Split(tuple(bounds))


def _scaled(layers: Layers, by: float) -> Layers:
    return replace(
        layers,
        seconds=tuple(float(value) * by for value in layers.seconds),
        embedding=float(layers.embedding) * by,
        head=float(layers.head) * by,
    )


def _timeline(path: Path) -> Timeline:
    try:
        return Timeline.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def numbers_of(name: str, text: str) -> tuple[Fraction, ...]:
    """Numbers with commas between them; "" is none.

    Raises:
        UserError: one is no number.
    """
    try:
        return tuple(Fraction(word) for word in text.split(",")) if text else ()
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{name} {text}: write numbers such as 2, 0.5 or 1/3 with commas between them") from None


def _lost(words: Sequence[str]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for word in words or ("1",):
        stage, _, replica = word.partition(".")
        if not stage.isdigit() or not (replica or "0").isdigit():
            raise UserError(f"--lose {word}: write a stage, or a stage and a replica of it: 1 or 1.0, counted from 0")
        found.setdefault(int(stage), []).append(int(replica or 0))
    return found


def text(told: Forecast) -> str:
    """For people: a line for each way, then why the last one decides what it does."""
    start = told.policies[0]
    members = [len(stage) for stage in told.pipeline.members]
    lines = [
        f"{len(members)} stages of {members[0]} replicas, layers {_list(told.pipeline.split.counts())}, "
        f"{told.pipeline.slots // told.pipeline.micro} micro-batches; times are {told.unit}",
        "",
    ]
    width = max(len(one.name) for one in told.policies)
    lines.append(f"{'':{width}}  {'step':>8}  {'samples':>7}  throughput")
    for one in told.policies:
        share = float(one.throughput / start.throughput)
        lines.append(f"{one.name:{width}}  {float(one.seconds):8.4g}  {one.slots:7}  {share:.1%}")
    decision = told.policies[-1].decision
    if decision is not None:
        lines += ["", *(_reason(reason) for reason in decision.reasons)]
    return "\n".join(lines)


def _reason(reason: dict[str, Any]) -> str:
    seconds = reason.get("seconds", {})
    cost = ""
    if None not in (seconds.get("before"), seconds.get("after")):
        cost = f" [step {seconds['before']:.4g} -> {seconds['after']:.4g}]"
    more = ""
    if reason["axis"] == "graph" and reason["decision"] == "move":
        bounds = reason["layers"]
        counts = [b - a for a, b in pairwise(bounds)]
        more = f" layers {_list(counts)}, {len(reason['moved'])} of them move;"
    if reason["axis"] == "frequency" and reason["clocks"]:
        more = f" clocks {', '.join(f'{clock:g}' for clock in reason['clocks'])};"
    return f"{reason['axis']}: {reason['decision']}{cost};{more} {reason['why']}"


def _list(values: Sequence[Time]) -> str:
    return " ".join(map(str, values))
