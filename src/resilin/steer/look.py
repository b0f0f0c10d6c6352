"""What a selector, mixer or weighter may look at: the run as it stands, and pools of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resilin.data.pool import Pool, pool_size
from resilin.keys import Keys
from resilin.nouns import Batch, State, StepView
from resilin.steer.evaluating import device_of, evaluating
from resilin.steer.token_losses import call, sample_losses


@dataclass(frozen=True, slots=True)
class Look:
    """The run between two steps, and what is asked for.

    Attributes:
        view: model, objective, optimizer and keys of the run.
        pool: the samples to choose from.
        find_target: gives the samples that the run should become good at, made on first use.
        count: how many samples are wanted (selectors); 0 for others.
        update: u, which decision this is, from 1 (in a flex epoch, for selectors).
        updates: how many there are; None where they go on for ever.
        seed: of the run.
        batch_size: samples computed at once.
        memory: what must outlive this decision (and a resume): tensors, numbers, text, lists and dicts of them.
        cache: what may be kept between decisions but is computed again after a resume, to the same values.
    """

    view: StepView
    pool: Pool
    find_target: Callable[[], Pool]
    count: int
    update: int
    updates: int | None
    seed: int
    batch_size: int = 32
    memory: State = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model as it is now."""
        return self.view.model

    @property
    def size(self) -> int:
        """Samples of the pool."""
        return pool_size(self.pool)

    def keys(self, purpose: str) -> Keys:
        """Keys of this decision, the same on every rank; draw with `resilin.steer.draws`."""
        return Keys.of_step(self.seed, self.view.step).fold("steer").fold(purpose)

    @property
    def target(self) -> Pool:
        """The samples that the run should become good at.

        Raises:
            DataError: none are named, and the source has no validation split.
        """
        return self.find_target()

    def batches(self, pool: Pool, samples: Sequence[int] | None = None) -> Iterator[Batch]:
        """The samples (None: all) in order, on the model's device, `batch_size` at a time."""
        numbers = range(pool_size(pool)) if samples is None else samples
        device = device_of(self.model)
        for start in range(0, len(numbers), self.batch_size):
            yield pool.read(numbers[start : start + self.batch_size]).to(device)

    def losses(self, pool: Pool, samples: Sequence[int] | None = None) -> Tensor:
        """The loss per unit of each sample (None: all of the pool), (N,) float32 on the CPU, without dropout."""
        with evaluating(self.model), torch.no_grad(), self.view.autocast():
            parts = [sample_losses(self.model, self.view.objective, b).cpu() for b in self.batches(pool, samples)]
        return torch.cat(parts) if parts else torch.zeros(0)

    def outputs(self, pool: Pool, samples: Sequence[int] | None = None) -> Iterator[tuple[Batch, Any]]:
        """Each batch of samples with the model's output for it, without dropout and without a graph."""
        with evaluating(self.model), torch.no_grad(), self.view.autocast():
            for batch in self.batches(pool, samples):
                yield batch, call(self.model, batch)
