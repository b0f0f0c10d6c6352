"""Steps of data parallelism: ZeRO-1 with canonical sums, torch's DistributedDataParallel and FSDP2, the same model."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel_rows.turns import in_turns, row
from resilin.bench.results import Row
from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken, NextTokenLoss
from resilin.optim.adamw import AdamW
from resilin.optim.schedule import Constant
from resilin.parallel.assemble import assemble
from resilin.parallel.blueprint import Blueprint
from resilin.parallel.degrees import Degrees
from resilin.parallel.whole_model import WholeModel
from resilin.parallel.world import World

SEED, LR, DECAY, BETAS, CLIP = 0, 3e-4, 0.1, (0.9, 0.95), 1.0
TO_DDP = {"fast": 0.95, "exact": 0.87}
SAME_LOSS = 1e-3  # relative, after all steps


@dataclass(frozen=True)
class Case:
    """A model and a worker's step.

    Attributes:
        model: a decoder.
        rows: of a micro-batch.
        tokens: of a row.
        micros: micro-batches of a worker.
        rounds: steps that are timed of each contender.
    """

    model: DecoderSettings
    rows: int
    tokens: int
    micros: int
    rounds: int

    def __str__(self) -> str:
        outline = self.model.outline(ModelContext(SEED))
        assert outline is not None
        millions = sum(p.numel() for p in outline.parameters()) / 1e6
        micros = "a micro-batch" if self.micros == 1 else f"{self.micros} micro-batches"
        return f"{millions:.2g}M parameters, {micros} of {self.rows}x{self.tokens} tokens a worker"

    def slots(self) -> int:
        """Of a step of all workers."""
        return dist.get_world_size() * self.micros * self.rows

    def batch(self, step: int, device: torch.device) -> Batch:
        """This worker's."""
        each = self.micros * self.rows
        slots = torch.arange(dist.get_rank() * each, (dist.get_rank() + 1) * each)
        rows = torch.stack(
            [
                torch.randint(0, self.model.vocab_size, (self.tokens + 1,), generator=_draw(step, slot))
                for slot in slots.tolist()
            ]
        )
        fields = {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}
        return Batch(slots, fields).to(device)


def _draw(step: int, slot: int) -> torch.Generator:
    return torch.Generator().manual_seed(step * 65536 + slot)


class Ours:
    """`Workers` on one mode of reduction, as a run assembles it."""

    def __init__(self, case: Case, world: World, device: torch.device, *, exact: bool) -> None:
        self.case, self.device = case, device
        self.model: Decoder = case.model.build(ModelContext(SEED)).to(device)
        settings, objective = AdamW(lr=LR, weight_decay=DECAY, betas=BETAS, schedule=Constant()), NextToken().build()
        made = assemble(
            world,
            WholeModel(self.model, objective, self.model, device=device, autocast=nullcontext),
            Blueprint.uncut(self.model, world.degrees),
            lambda owned: settings.build_owned(self.model, 1, owned),
            objective=objective,
            micro_batch_size=case.rows,
            clip_norm=CLIP,
            exact=exact,
            device=device,
            autocast=nullcontext,
        )
        self.engine, self.optimizer, self.loss = made.engine, made.optimizer, math.nan

    def prepare(self, step: int) -> None:
        self.batch = self.case.batch(step, self.device)

    def __call__(self, step: int) -> None:
        self.optimizer.zero_grad()
        keys = Keys(SEED, step, self.batch.slots_B)
        found = self.engine.gradient(self.batch, keys, self.case.slots())
        self.optimizer.step(step)
        self.loss = found.loss


class LossOf(nn.Module):
    """What torch's wrappers take: the model and the same objective, as one module."""

    def __init__(self, model: Decoder, objective: NextTokenLoss) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective(self.model, batch, None).sum


class Torchs:
    """A training step around DDP or FSDP2: gradients of the mean over all tokens, clipped, fused AdamW."""

    def __init__(self, case: Case, device: torch.device, kind: str) -> None:
        self.case, self.device, self.kind = case, device, kind
        model: Decoder = case.model.build(ModelContext(SEED)).to(device)
        module = LossOf(model, NextToken().build())
        if kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            self.module: nn.Module = DistributedDataParallel(module)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            self.module = fully_shard(module, mesh=mesh)
        matrices = [p for p in self.module.parameters() if p.ndim > 1]
        vectors = [p for p in self.module.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=1e-8, fused=True)
        self.summed = torch.zeros(())

    def prepare(self, step: int) -> None:
        self.batch = self.case.batch(step, self.device)

    def __call__(self, step: int) -> None:
        rows, micros = self.case.rows, self.case.micros
        # Both average over workers: a worker's share of the mean is over its own tokens.
        scale = 1 / (micros * rows * self.case.tokens)
        self.optimizer.zero_grad()
        self.summed = torch.zeros((), device=self.device)
        for micro in range(micros):
            last = micro == micros - 1
            if self.kind == "fsdp2":
                self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
            with nullcontext() if last or self.kind == "fsdp2" else self.module.no_sync():  # type: ignore[operator]
                loss = self.module(self.batch.rows(micro * rows, (micro + 1) * rows)) * scale
                loss.backward()
            self.summed += loss.detach()
        nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()

    @property
    def loss(self) -> float:
        told = self.summed.double()
        dist.all_reduce(told)
        return float(told) / dist.get_world_size()


def rows_of(case: Case, device: torch.device, peers: tuple[str, ...] = ("ddp", "fsdp2")) -> list[Row]:
    """Seconds a step of all contenders in these processes."""
    workers = dist.get_world_size()
    world = World(Degrees(data=workers), dist.get_rank())
    made: dict[str, Ours | Torchs] = {mode: Ours(case, world, device, exact=mode == "exact") for mode in TO_DDP}
    made |= {peer: Torchs(case, device, peer) for peer in peers}
    label = f"{case}, {workers} workers"

    def prepared(step: int) -> None:
        for each in made.values():
            each.prepare(step)

    times = in_turns(made, case.rounds, device, prepare=prepared, label=label)
    losses = {name: each.loss for name, each in made.items()}
    apart = max(abs(loss - losses["fast"]) / abs(losses["fast"]) for loss in losses.values())
    failed = "" if apart < SAME_LOSS else f"the contenders' losses are {apart:.1g} apart after the last step"
    said = {"ddp": "torch DDP", "fsdp2": "torch FSDP2"}
    return [
        row(f"{label}: a step, {mode} sums", times[mode], times[peer], said[peer], target, failed=failed)
        for mode in TO_DDP
        for peer in peers
        for target in [TO_DDP[mode] if peer == "ddp" else 1.0]
    ]
