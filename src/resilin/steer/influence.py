"""How much training on one sample would help another: scalar products of gradients, as LESS takes them.

Source: Xia et al., "LESS: Selecting influential data for targeted instruction tuning", 2024, sections 3 and 4.
Shapes: N training samples, M target samples, K projected dimensions, B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from resilin.nouns import Batch, Objective, Optimizer
from resilin.steer.look import Look
from resilin.steer.projection import Projection
from resilin.steer.sample_gradients import Gradients, sample_gradients

Direction = Literal["adam", "sgd"]
Aggregate = Literal["mean", "max", "subtask"]


def adam_moments(optimizer: Optimizer, names: Mapping[str, object]) -> dict[str, tuple[Tensor, Tensor]]:
    """M and v of each trainable parameter, as the run's optimizer holds them now.

    Raises:
        ValueError: it keeps none: it is not Adam.
    """
    saved = optimizer.state_dict().get("parameters", {})
    found = {}
    for name in names:
        moments = saved.get(name, {})
        if "exp_avg" not in moments or "exp_avg_sq" not in moments:
            raise ValueError(
                f"direction = 'adam' needs Adam's moments, and the optimizer keeps "
                f"{', '.join(sorted(moments)) or 'nothing'} for {name!r}: train with AdamW, or set direction = 'sgd'"
            )
        found[name] = (moments["exp_avg"], moments["exp_avg_sq"])
    return found


def adam_direction(
    gradients: Gradients, moments: Mapping[str, tuple[Tensor, Tensor]], betas: tuple[float, float], eps: float
) -> Gradients:
    """The step Adam would take on each sample alone, without bias correction (LESS, definition 3.1)."""
    one, two = betas
    found = {}
    for name, g in gradients.items():
        m, v = moments[name]
        found[name] = (one * m + (1 - one) * g) / ((two * v + (1 - two) * g.square()).sqrt() + eps)
    return found


def projected(
    look: Look,
    batches: object,
    projection: Projection,
    *,
    direction: Direction,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    memory: int = 2**28,
    objective: Objective | None = None,
) -> Tensor:
    """The projected gradients (or Adam directions) of all samples of some batches, (N, K) float32 on the CPU.

    Gradients are collected up to `memory` bytes before they are projected: the signs are drawn once for all of them.
    """
    objective = objective or look.view.objective
    waiting: list[Gradients] = []
    rows: list[Tensor] = []
    held = 0

    def flush() -> None:
        nonlocal held
        if waiting:
            whole = {name: torch.cat([part[name] for part in waiting]) for name in waiting[0]}
            rows.append(projection(whole).cpu())
        waiting.clear()
        held = 0

    moments: dict[str, tuple[Tensor, Tensor]] | None = None
    for batch in batches:  # type: ignore[attr-defined]
        assert isinstance(batch, Batch)
        with look.view.autocast():
            found = {name: g.float() for name, g in sample_gradients(look.model, objective, batch).items()}
        if direction == "adam":
            moments = moments or adam_moments(look.view.optimizer, found)
            found = adam_direction(found, moments, betas, eps)
        size = sum(g.numel() * g.element_size() for g in found.values())
        if held + size > memory:
            flush()
        waiting.append(found)
        held += size
    flush()
    return torch.cat(rows) if rows else torch.zeros(0, projection.dimensions)


def scores(
    train_NK: Tensor,
    target_MK: Tensor,
    aggregate: Aggregate,
    *,
    centred: bool = False,
    subtask_M: Tensor | None = None,
) -> Tensor:
    """The score of each training sample, (N,): cosines with the target samples, put together.

    Args:
        train_NK: projected directions.
        target_MK: projected gradients.
        aggregate: mean over target samples; max over them; or "subtask": the gradients of each sub-task are averaged
            and the largest cosine with one of these means counts (LESS, section 4.2).
        centred: take the mean direction of the pool away first: under Adam all directions share the momentum, which
            otherwise decides the score.
        subtask_M: the sub-task of each target sample; needed for "subtask".
    """
    if centred:
        train_NK = train_NK - train_NK.mean(0)
    train_NK, target_MK = normalize(train_NK, dim=1), normalize(target_MK, dim=1)
    if aggregate == "mean":
        return (train_NK @ target_MK.t()).mean(1)
    if aggregate == "subtask":
        assert subtask_M is not None
        tasks = torch.unique(subtask_M)
        target_MK = normalize(torch.stack([target_MK[subtask_M == task].mean(0) for task in tasks]), dim=1)
    return (train_NK @ target_MK.t()).max(1).values
