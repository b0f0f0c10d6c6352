"""The base of every weighter, and what it may look at: the batch of the coming step.

Shapes: B samples of the step's whole batch, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.config import Settings
from resilin.config.errors import UserError
from resilin.nouns import Batch, Objective, State, StepView
from resilin.steer.evaluating import device_of, evaluating
from resilin.steer.token_losses import call, sample_losses, token_losses


class WeightError(UserError):
    """Weights that cannot be trained with; the text says what is wrong with them."""


@dataclass(slots=True)
class StepLook:
    """The step that is about to be taken.

    Attributes:
        view: the run.
        batch: the whole batch of the step, on the host.
        objective: whose loss is weighted.
        seed: of the run.
        names: of the source's domains; None where it has none.
        folder: of the run, for what a weighter writes down; None where nothing is kept.
        chunk: samples computed at once.
        memory: what must outlive the step (and a resume): tensors, numbers, text, lists and dicts of them.
        cache: what may be kept but is computed again after a resume, to the same values.
        figures: what is to be logged with the step.
    """

    view: StepView
    batch: Batch
    objective: Objective
    seed: int
    names: tuple[str, ...] | None
    folder: Path | None
    chunk: int
    memory: State
    cache: dict[str, Any]
    figures: dict[str, float] = field(default_factory=dict)

    def chunks(self) -> Iterator[Batch]:
        """The batch in parts, on the model's device."""
        device = device_of(self.view.model)
        for start in range(0, len(self.batch), self.chunk):
            yield self.batch.rows(start, min(start + self.chunk, len(self.batch))).to(device)

    def losses(self) -> Tensor:
        """The loss per unit of each sample, (B,) float32 on the CPU, without dropout."""
        with evaluating(self.view.model), torch.no_grad(), self.view.autocast():
            return torch.cat([sample_losses(self.view.model, self.objective, part).cpu() for part in self.chunks()])

    def token_losses(self, model: torch.nn.Module | None = None) -> Tensor:
        """The cross-entropy of each token, (B, T) float32 on the CPU, 0 where none is predicted.

        Args:
            model: another one than the run's.
        """
        asked = self.view.model if model is None else model
        with evaluating(asked), torch.no_grad(), self.view.autocast():
            return torch.cat([token_losses(asked, part).cpu() for part in self.chunks()])

    def outputs(self) -> Iterator[tuple[Batch, Any]]:
        """Each part of the batch with the model's output, without dropout and without a graph."""
        with evaluating(self.view.model), torch.no_grad(), self.view.autocast():
            for part in self.chunks():
                yield part, call(self.view.model, part)


class Weighter(Settings, ABC):
    """Decides how much each sample of a batch counts; `weighter = { use = "module:Class" }` names a subclass."""

    @abstractmethod
    def weights(self, look: StepLook) -> Tensor:
        """(B,) at least 0, not all 0."""


def checked_weights(weights_B: Tensor, count: int, who: str) -> Tensor:
    """Weights as float32 on the CPU.

    Raises:
        WeightError: not one for each sample, or a value that is negative or not finite, or all 0.
    """
    if weights_B.shape != (count,):
        raise WeightError(f"{who} gave weights of shape {tuple(weights_B.shape)} for {count} samples")
    weights_B = weights_B.detach().float().cpu()
    if not bool(torch.isfinite(weights_B).all()) or bool((weights_B < 0).any()) or not bool((weights_B > 0).any()):
        raise WeightError(f"{who} gave weights {weights_B.tolist()}: they should be at least 0, finite, and not all 0")
    return weights_B
