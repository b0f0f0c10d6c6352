"""Next-token prediction whose memory is counted, with rows divided over processes where there are several.

The loss runs its own backward pass, so that what is alive can be counted in both, and hands the gradients over when the
run asks for them. With several ranks this process is the first; the others are its children, which have a copy of the
model and get its weights before each step.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.nouns import Batch, Loss, Max, State
from resilin.objective.next_token import NextToken, NextTokenLoss
from resilin.objective.settings import ObjectiveContext
from resilin.parallel.group import Group
from resilin.parallel.sequence.part import ContextKind
from resilin.parallel.sequence.ring import ring
from resilin.parallel.sequence.shard import shard_sequence
from resilin.parallel.sequence.ulysses import ulysses
from resilin.recipes.alst.alive import Alive

_DIVIDE = {"ulysses": ulysses, "ring": ring}


class Counted(NextToken):
    """`NextToken` that logs `kept_bytes`, alive between the two passes, and `peak_bytes`, of the rank that has most."""

    ranks: int = Field(default=1, ge=1)
    """Processes among which each row is divided."""
    kind: ContextKind = "ulysses"
    """How."""

    def build(self, context: ObjectiveContext | None = None) -> NextTokenLoss:
        """The loss."""
        return CountedLoss(self)


class _Given(torch.autograd.Function):
    """A sum whose gradients are known: (sum, gradients, parameters) -> sum."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *(gradient * grad for gradient in ctx.gradients)


def _pass(
    objective: NextTokenLoss, model: nn.Module, batch: Batch, keys: Keys | None, group: Group, kind: ContextKind
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients, (loss, units), and (kept, peak) bytes, over all ranks of the group."""
    parameters, mine = list(model.parameters()), shard_sequence(batch, group, kind)
    with Alive() as alive:
        loss = objective(model, mine, keys)
        kept = alive.now
        gradients = list(torch.autograd.grad(loss.sum, parameters))
    sums = torch.stack((loss.sum.detach().double(), loss.units.double()))
    bytes_ = torch.tensor([kept, alive.peak], dtype=torch.float64)
    if group.size > 1:
        for tensor in (*gradients, sums):
            dist.all_reduce(tensor)
        dist.all_reduce(bytes_, dist.ReduceOp.MAX)
    return gradients, sums, bytes_


def _take_weights(model: nn.Module) -> None:
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)


def _join(meeting: str, rank: int, ranks: int) -> Group:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    return Group.of()


def _child(meeting: str, rank: int, settings: Counted, shape: DecoderSettings, pipe: Connection) -> None:
    torch.set_num_threads(1)
    group, model, objective = _join(meeting, rank, settings.ranks), Decoder(shape, seed=0), NextTokenLoss(settings)
    _DIVIDE[settings.kind](model, group)
    while True:
        try:
            slots, fields, keys = pipe.recv()
        except EOFError:
            return
        _take_weights(model)
        batch = Batch(torch.from_numpy(slots), {name: torch.from_numpy(field) for name, field in fields.items()})
        own = None if keys is None else Keys(keys[0], keys[1], batch.slots_B)
        _pass(objective, model, batch, own, group, settings.kind)


class _Ranks:
    """This process as the first rank, and its children."""

    def __init__(self, settings: Counted, model: Decoder) -> None:
        context, self._folder = multiprocessing.get_context("spawn"), tempfile.TemporaryDirectory()
        meeting = str(Path(self._folder.name) / "meeting")
        self._pipes: list[Connection] = []
        for rank in range(1, settings.ranks):
            mine, theirs = context.Pipe()
            arguments = (meeting, rank, settings, model.settings, theirs)
            context.Process(target=_child, args=arguments, daemon=True).start()
            theirs.close()
            self._pipes.append(mine)
        if dist.is_initialized():  # of the run before, in the same process
            dist.destroy_process_group()
        self.group = _join(meeting, 0, settings.ranks)
        _DIVIDE[settings.kind](model, self.group)

    def send(self, batch: Batch, keys: Keys | None, model: nn.Module) -> None:
        """What all ranks work on next."""
        fields = {name: field.numpy() for name, field in batch.fields.items()}
        for pipe in self._pipes:
            pipe.send((batch.slots_B.numpy(), fields, None if keys is None else (keys.seed, keys.step)))
        _take_weights(model)

    def close(self) -> None:
        """Let the children end."""
        for pipe in self._pipes:
            pipe.close()


class CountedLoss(NextTokenLoss):
    """The loss of `Counted`."""

    def __init__(self, settings: Counted) -> None:
        super().__init__(settings)
        self.counted, self._ranks = settings, None

    _ranks: _Ranks | None

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss sum with gradients that are there already, its units, and the logs of memory."""
        group = Group.alone()
        if self.counted.ranks > 1:
            if self._ranks is None:
                assert isinstance(model, Decoder)
                self._ranks = _Ranks(self.counted, model)
                weakref.finalize(self, self._ranks.close)
            group = self._ranks.group
            self._ranks.send(batch, keys, model)
        plain = NextTokenLoss(self.counted)
        gradients, sums, bytes_ = _pass(plain, model, batch, keys, group, self.counted.kind)
        total: Tensor = _Given.apply(sums[0], gradients, *model.parameters())
        return Loss(total, sums[1], {"kept_bytes": Max(bytes_[0]), "peak_bytes": Max(bytes_[1])})

    def state_dict(self) -> State:
        """Nothing."""
        return {}
