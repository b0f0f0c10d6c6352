"""LESS: the samples whose gradients point where the target's do, with the optimizer as it stands.

Source: Xia et al., "LESS", 2024; as a live selector in DataFlex, 2026.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from resilin.data.pool import part_of, pool_size
from resilin.steer.influence import Aggregate, Direction, projected, scores
from resilin.steer.look import Look
from resilin.steer.projection import Projection
from resilin.steer.selector import Selection, Selector

Beta = Annotated[float, Field(ge=0, lt=1)]


class InfluenceSettings(Selector):
    """What every selector by gradients has."""

    direction: Direction = "adam"
    """Training samples enter by the step Adam would take on them (its live moments), or by their plain gradient."""
    aggregate: Aggregate = "mean"
    """Over the target's samples: mean, max, or the best of its sub-tasks' means (a target's parts are its
    sub-tasks)."""
    centred: bool = False
    """Take the pool's mean direction away first, which under Adam is mostly the shared momentum."""
    dimensions: Annotated[int, Field(ge=0)] = 4096
    """Of the random projection; 0: none."""
    projection_seed: Annotated[int, Field(ge=0)] = 123
    """Of its signs."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Of Adam's direction; those of the optimizer are the right ones where they differ."""
    eps: Annotated[float, Field(ge=0)] = 1e-8
    """Of Adam's direction."""
    memory_mib: Annotated[int, Field(gt=0)] = 256
    """Gradients held before they are projected."""

    def projection(self) -> Projection:
        """The projection, the same at every selection."""
        return Projection(self.dimensions, self.projection_seed)

    def directions(self, look: Look, samples: Tensor | None = None) -> Tensor:
        """Projected directions of training samples (None: of all), (N, K)."""
        return projected(
            look,
            look.batches(look.pool, None if samples is None else samples.tolist()),
            self.projection(),
            direction=self.direction,
            betas=self.betas,
            eps=self.eps,
            memory=self.memory_mib * 2**20,
        )

    def target_gradients(self, look: Look) -> Tensor:
        """Projected gradients of the target's samples, (M, K)."""
        batches = look.batches(look.target)
        return projected(look, batches, self.projection(), direction="sgd", memory=self.memory_mib * 2**20)

    def subtasks(self, look: Look) -> Tensor:
        """The part of each target sample, (M,)."""
        return torch.from_numpy(part_of(look.target, np.arange(pool_size(look.target))))

    def score(self, look: Look, train_NK: Tensor, target_MK: Tensor) -> Tensor:
        """The score of each training sample, (N,)."""
        subtask_M = self.subtasks(look) if self.aggregate == "subtask" else None
        return scores(train_NK, target_MK, self.aggregate, centred=self.centred, subtask_M=subtask_M)


class LESS(InfluenceSettings):
    """The `count` samples of the highest score."""

    accumulate: bool = False
    """Rank by the sum of the scores of all selections so far, each times the learning rate it was made at, as the
    original does over checkpoints."""

    def select(self, look: Look) -> Selection:
        """The best, by score."""
        score_N = self.score(look, self.directions(look), self.target_gradients(look))
        if self.accumulate:
            score_N = score_N * learning_rate(look)
            if "scores" in look.memory:
                score_N = score_N + look.memory["scores"]
            look.memory["scores"] = score_N
        chosen = torch.argsort(score_N, descending=True, stable=True)[: look.count]
        figures = {"score of the pool": float(score_N.mean()), "score of the chosen": float(score_N[chosen].mean())}
        return Selection(chosen, figures)


def learning_rate(look: Look) -> float:
    """The learning rate of the coming step; 1 for an optimizer that does not say."""
    optimizer = look.view.optimizer
    if hasattr(optimizer, "lr") and hasattr(optimizer, "schedule"):
        return float(optimizer.lr * optimizer.schedule(look.view.step))
    return 1.0
