"""Replicas of a run that are lost on the way, played in one process: who computes which slots, with whose numbers.

Every replica has its own micro-batches and passes, and may have its own stream of random numbers, as workers have
that seed a generator with their rank. What is compared is what becomes of a step when one of them is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.config import component
from resilin.keys import Keys, hash64
from resilin.nouns import Batch, Loss, Objective, State
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings
from resilin.parallel.pipeline import SlotTable, in_blocks, slots_of
from resilin.transforms import ObjectiveTransform

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Replicas(ObjectiveSettings):
    """An objective computed by replicas, some of which are lost."""

    inner: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    """What they compute."""
    replicas: Positive = 4
    """How many begin."""
    micro: Positive = 8
    """Slots of a micro-batch; replicas begin with contiguous blocks of them."""
    lost: tuple[tuple[Count, Count], ...] = ()
    """(step, replica): after so many steps it is gone."""
    orphans: Literal["whole", "reshape", "dropped"] = "whole"
    """What becomes of a lost replica's micro-batches: they move whole, are cut and join those of the others, or are
    left out of the step, whose gradient is then divided by what is left."""
    randomness: Literal["slot", "rank"] = "slot"
    """Random numbers belong to slots, or are drawn by each replica from a generator of its own."""
    processes: bool = False
    """Replicas are real processes, which are killed (`resilin.recipes.elaswave.losses`): nothing is played here."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        gone = [replica for _, replica in self.lost]
        if len(set(gone)) != len(gone) or len(gone) >= self.replicas or max(gone, default=0) >= self.replicas:
            raise ValueError(f"of {self.replicas} replicas each can be lost once, and one has to be left, not {gone}")
        if list(self.lost) != sorted(self.lost):
            raise ValueError(f"losses are listed in the order of steps, not {self.lost}")
        if self.processes and (self.randomness != "slot" or self.orphans != "whole"):
            raise ValueError("real processes move whole micro-batches, whose random numbers belong to slots")
        return self

    def build(self, context: ObjectiveContext | None = None) -> Objective:
        """What they compute, by replicas."""
        inner = self.inner.build(context)
        return inner if self.processes else ReplicaLoss(inner, self, context.seed if context is not None else 0)

    def table(self, slots: int, step: int) -> SlotTable:
        """Who computes which slots of a step; of slots that are left out, the replicas that are lost."""
        table = in_blocks(slots, self.replicas, self.micro)
        for when, replica in self.lost if self.orphans != "dropped" else ():
            if step >= when:
                table = table.without(replica, "whole" if self.orphans == "whole" else "reshape")
        return table


@dataclass(frozen=True, slots=True)
class StreamKeys(Keys):
    """Random numbers out of a generator, one after the other, whatever slot, layer or step they are for."""

    stream: torch.Generator | None = None

    def bits(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """The next words of the generator."""
        size = (len(self.slots_B), *shape)
        return torch.randint(0, 2**32, size, generator=self.stream, dtype=torch.int64).to(device)


class ReplicaLoss(ObjectiveTransform):
    """See `Replicas`: the sum of all replicas' own sums, whose gradient is that of their sum over all."""

    def __init__(self, inner: Objective, settings: Replicas, seed: int) -> None:
        super().__init__(inner)
        self.settings = settings
        self.streams = [
            torch.Generator().manual_seed(hash64("replica", seed, replica) >> 1) for replica in range(settings.replicas)
        ]

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss of a whole step; of held-out data what is wrapped gives."""
        if keys is None:
            return self.inner(model, batch, None)
        parts = [self.inner(model, rows, own) for rows, own in self._passes(batch, keys)]
        total, units, logs = parts[0].sum, parts[0].units, dict(parts[0].logs)
        for part in parts[1:]:
            total, units = total + part.sum, units + part.units
            logs = {name: log.merge(part.logs[name]) for name, log in logs.items()}  # type: ignore[arg-type]
        return Loss(total, units, logs)

    def _passes(self, batch: Batch, keys: Keys) -> Iterator[tuple[Batch, Keys]]:
        """The rows and keys of every micro-batch, replica by replica."""
        if batch.slots_B.tolist() != list(range(len(batch))):
            raise ValueError("replicas share out whole steps: set train.micro_batch_size = 0")
        table = self.settings.table(len(batch), keys.step)
        gone = {replica for step, replica in self.settings.lost if keys.step >= step}
        for replica in table.replicas:
            if replica in gone:
                continue
            for micro in table.micros(replica):
                rows = torch.tensor(slots_of(micro))
                fields = {name: tensor[rows] for name, tensor in batch.fields.items()}
                own = keys if self.settings.randomness == "slot" else self._stream(keys, replica)
                slots_B = batch.slots_B[rows]
                yield Batch(slots_B, fields), replace(own, slots_B=slots_B)

    def _stream(self, keys: Keys, replica: int) -> Keys:
        return StreamKeys(keys.seed, keys.step, keys.slots_B, keys.path, stream=self.streams[replica])

    def own_state(self) -> State:
        """Where every replica's stream is."""
        if self.settings.randomness == "slot":
            return {}
        return {"streams": [stream.get_state() for stream in self.streams]}

    def load_own_state(self, state: State) -> None:
        """Go on there."""
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.set_state(saved.cpu())
