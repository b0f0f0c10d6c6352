"""Passes through a pipeline: our executor and torch.distributed.pipelining, the same stages, schedule and batch."""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel_rows.held import Held
from parallel_rows.turns import in_turns, row
from resilin.bench.results import Row
from resilin.keys import Keys
from resilin.models.decoder import Decoder, DecoderOutput
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.models.stage_span import Hidden
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken
from resilin.parallel.canonical import GradientSum
from resilin.parallel.group import Group
from resilin.parallel.messages import tell_all
from resilin.parallel.part import divide_decoder, stages_of
from resilin.parallel.pipeline.build import build
from resilin.parallel.pipeline.passes import PipelinePasses
from resilin.parallel.pipeline.schedule import Action, Kind
from resilin.parallel.pipeline.simulate import simulate
from resilin.parallel.pipeline.stage import Stage, cut
from resilin.parallel.pipeline.timeline import Record, Timeline
from resilin.parallel.settings import ParallelSettings
from resilin.parallel.world import World

SEED, SAME = 0, 1e-4  # relative, of gradients
TORCHS = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B", "interleaved": "ScheduleInterleaved1F1B"}
WITHIN = 1.1  # how far a measured bubble may be from its formula
UNDISTURBED = 0.98  # of the time of its actions every rank had a core: else another program took part of the step


@dataclass(frozen=True)
class Case:
    """A model and a batch; blocks are shared as in a run: by what they compute, the head counted.

    Attributes:
        model: a decoder.
        rows: of a micro-batch.
        tokens: of a row.
    """

    model: DecoderSettings
    rows: int
    tokens: int

    def __str__(self) -> str:
        model = self.model
        return f"{model.layers} blocks of width {model.hidden_size}, micro-batches of {self.rows}x{self.tokens} tokens"

    def settings(self, schedule: str) -> ParallelSettings:
        ranks, chunks = dist.get_world_size(), 2 if schedule == "interleaved" else 1
        return ParallelSettings(pipeline=ranks, schedule=schedule, chunks=chunks)

    def build(self, device: torch.device) -> Decoder:
        built: Decoder = self.model.build(ModelContext(SEED)).to(device)
        return built

    def batch(self, micros: int, device: torch.device) -> Batch:
        draw = torch.Generator().manual_seed(SEED)
        rows = torch.randint(0, self.model.vocab_size, (micros * self.rows, self.tokens + 1), generator=draw)
        fields = {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}
        return Batch(torch.arange(len(rows)), fields).to(device)


class Ours:
    """The passes that a run divided into stages makes."""

    def __init__(self, case: Case, schedule: str, device: torch.device) -> None:
        self.case, self.device = case, device
        settings = case.settings(schedule)
        world = World(settings.degrees(dist.get_world_size()), dist.get_rank())
        part = divide_decoder(
            settings,
            world,
            case.build(device),
            NextToken().build(),
            tokens=case.tokens,
            keep_whole=set(),
            device=device,
            autocast=nullcontext,
        )
        assert isinstance(part.passes, PipelinePasses)
        self.passes = part.passes

    def step(self, batch: Batch) -> None:
        """Gradients of the sum over all tokens into `.grad`."""
        rows = self.case.rows
        for parameter in self.parameters():
            parameter.grad = None
        keys = Keys(SEED, 0, batch.slots_B)
        micros = [(batch.rows(at, at + rows), keys.rows(at, at + rows)) for at in range(0, len(batch), rows)]
        sums = [GradientSum(list(chunk.parameters()), len(micros)) for chunk in self.passes.chunks]
        self.passes.train(micros, lambda chunk, _: sums[chunk].collect(), {})
        for each in sums:
            each.finish()

    def parameters(self) -> list[nn.Parameter]:
        return [p for chunk in self.passes.chunks for p in chunk.parameters()]


class StageModule(nn.Module):
    """A stage as torch's pipelines call it: token ids or hidden states in, hidden states out."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage, self.module = stage, stage.module

    def forward(self, given: Tensor) -> Tensor:
        first = self.stage.span.first
        # Later stages read the shape of the ids only.
        tokens = given if first else given.new_zeros(given.shape[:2], dtype=torch.int64)
        result = self.stage.forward(None if first else Hidden(given), lambda: self.module(tokens))
        return result.hidden_BTD


class Torchs:
    """The same stages in a schedule of torch.distributed.pipelining."""

    def __init__(self, case: Case, schedule: str, micros: int, device: torch.device) -> None:
        import torch.distributed.pipelining as pipelining

        settings, model = case.settings(schedule), case.build(device)
        world = World(settings.degrees(dist.get_world_size()), dist.get_rank())
        split, rank_of = stages_of(settings, world, model, case.tokens)
        mine = [stage for stage, rank in enumerate(rank_of) if rank == dist.get_rank()]
        objective = NextToken().build()
        self.modules = [StageModule(Stage(n, part)) for n, part in zip(mine, cut(model, split, mine), strict=True)]
        self.first, self.last = 0 in mine, split.stages - 1 in mine
        head = self.modules[-1].module

        def loss(hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
            slots = torch.arange(len(labels_BT))
            return objective.loss_of(head, DecoderOutput(hidden_BTD), Batch(slots, {"labels": labels_BT})).sum

        stages = [
            pipelining.PipelineStage(module, module.stage.number, split.stages, device) for module in self.modules
        ]
        made = getattr(pipelining, TORCHS[schedule])
        given = stages if schedule == "interleaved" else stages[0]
        self.schedule = made(given, n_microbatches=micros, loss_fn=loss, scale_grads=False)

    def step(self, batch: Batch) -> None:
        for parameter in self.parameters():
            parameter.grad = None
        inputs = (batch["tokens"],) if self.first else ()
        more = {"target": batch["labels"], "losses": []} if self.last else {}
        self.schedule.step(*inputs, **more, return_outputs=False)

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules for p in module.parameters()]


def against_torch(case: Case, micros: int, rounds: int, device: torch.device) -> list[Row]:
    """Seconds of forward and backward passes over a batch."""
    rows, batch = [], case.batch(micros, device)
    for schedule in TORCHS:
        ours, theirs = Ours(case, schedule, device), Torchs(case, schedule, micros, device)
        made = {"ours": lambda _, o=ours: o.step(batch), "torch": lambda _, t=theirs: t.step(batch)}
        label = f"{schedule}, {dist.get_world_size()} stages" + (" in 2 parts" if schedule == "interleaved" else "")
        label = f"{label}, {micros} micro-batches, {case}"
        times = in_turns(made, rounds, device, label=label)
        apart = max(tell_all(_apart(ours.parameters(), theirs.parameters()), Group.of()))
        failed = "" if apart < SAME else f"the two gradients are {apart:.1g} apart"
        rows.append(row(label, times["ours"], times["torch"], "torch.distributed.pipelining", 1.0, failed=failed))
    return rows


def _apart(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> float:
    """The largest relative difference of two lists of gradients."""
    found = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        if mine.grad is None or other.grad is None:
            return float(mine.grad is not other.grad)
        found = max(found, float((mine.grad - other.grad).abs().max() / other.grad.abs().max().clamp_min(1e-12)))
    return found


def bubbles(
    case: Case, schedules: tuple[str, ...], counts: tuple[int, ...], rounds: int, device: torch.device
) -> list[Row]:
    """Idle over busy time of the busiest rank against (p - 1) / m, and against a simulation with the measured costs.

    The busiest rank never waits once its first input is there, so that stages of slightly unlike cost change the figure
    little; records leave out the time that an action waits for its input. The formula is of stages of equal cost; the
    simulation takes the mean of each stage's forward and backward passes.
    """
    rows, ranks = [], dist.get_world_size()
    for schedule in schedules:
        ours = Ours(case, schedule, device)
        ours.passes.measure = True
        for micros in counts:
            batch = case.batch(micros, device)
            steps = [_measured_step(ours, batch) for _ in range(rounds + 1)][1:]
            quiet = [step for step in steps if device.type == "cuda" or step.share >= UNDISTURBED]
            rows += _bubble_rows(f"{schedule}, {ranks} stages, {micros} micro-batches, {case}", schedule, micros,
                                 [step.line for step in quiet or steps], _said(steps, quiet))  # fmt: skip
    return rows


class _Step(NamedTuple):
    """One step of all ranks.

    Attributes:
        line: of their actions.
        share: of the time of its actions, how much of it the rank had a core that had one least.
    """

    line: Timeline
    share: float


def _measured_step(ours: Ours, batch: Batch) -> _Step:
    dist.barrier()
    ours.step(batch)
    mine = [(str(r.action), r.rank, r.start, r.end) for r in ours.passes.records]
    share = ours.passes.core_seconds / sum(end - start for _, _, start, end in mine)
    everyone = tell_all((mine, share), Group.of())
    line = Timeline.of(Record(Action.parse(a), r, s, e) for each, _ in everyone for a, r, s, e in each)
    return _Step(line, min(share for _, share in everyone))


def _said(steps: list[_Step], quiet: list[_Step]) -> str:
    share = f"actions had a core for {statistics.median(step.share for step in steps):.2f} of their time"
    if len(quiet) == len(steps):
        return f"median of {len(steps)} steps; {share}"
    which = f"of {len(quiet)} steps of {len(steps)}, those in which" if quiet else f"of {len(steps)} steps; in none"
    return f"median {which} actions had a core for {UNDISTURBED} of their time; {share} in the median step"


def _bubble_rows(name: str, schedule: str, micros: int, lines: list[Timeline], said: str) -> list[Row]:
    ranks = lines[0].ranks
    found = [float(line.makespan / max(line.busy())) - 1 for line in lines]
    shares = [min(line.busy()) / max(line.busy()) for line in lines]
    took: dict[tuple[int, Kind], list[float]] = {}
    for line in lines:
        for record in line.records:
            took.setdefault((record.action.stage, record.action.kind), []).append(float(record.end - record.start))
    costs = {each: statistics.fmean(times) for each, times in took.items()}
    line = simulate(build(schedule, ranks, ranks, micros), lambda action: costs[action.stage, action.kind])
    simulated = float(line.makespan / max(line.busy())) - 1
    theory, measured = (ranks - 1) / micros, statistics.median(found)
    apart = max(measured / theory, theory / measured)
    common: dict[str, Any] = {
        "name": f"{name}: bubble over ideal time",
        "unit": "fraction",
        "ours": measured,
        "better": "lower",
        "runs": {"measured": found},
    }
    return [
        Row(
            **common,
            peer=theory,
            peer_name="(p - 1) / m",
            target=1 / WITHIN,
            failed="" if apart <= WITHIN else f"{apart:.2f} times apart, more than {WITHIN}",
            note="idle over busy time of the busiest rank, from records of all actions, "
            f"{said}; the other rank was busy {statistics.median(shares):.2f} times as long",
        ),
        Row(**common, peer=simulated, peer_name="simulated, each stage's mean costs as measured"),
    ]


def held(case: Case, schedules: tuple[str, ...], micros: int, device: torch.device) -> list[Row]:
    """Activations that each rank holds at most, in micro-batches."""
    rows, ranks = [], dist.get_world_size()
    for schedule in schedules:
        ours = Ours(case, schedule, device)
        peaks = []
        for count in (1, micros):
            ours.step(case.batch(count, device))  # masks and tables are made
            with Held(ours.parameters()) as seen:
                ours.step(case.batch(count, device))
            peaks.append(seen.peak)
        for rank, share in enumerate(tell_all(peaks[1] / peaks[0], Group.of())):
            most = micros if schedule == "gpipe" else min(micros, ranks - rank)
            said = "m" if schedule == "gpipe" else "min(m, p - r)"
            rows.append(
                Row(
                    name=f"{schedule}, {ranks} stages, {micros} micro-batches: activations that rank {rank} holds",
                    unit="micro-batches",
                    ours=share,
                    peer=most,
                    peer_name=said,
                    better="lower",
                    target=0.95,
                    note="peak of what autograd keeps, over that of a step of one micro-batch",
                )
            )
    return rows
