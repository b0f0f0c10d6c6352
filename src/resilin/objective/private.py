"""Differentially private training (DP-SGD): each sample's gradient is clipped, and noise is added to their sum.

[objective]
use = "resilin.objective.private:Private"
largest = 1.0
noise = 1.0

Each sample's gradient is taken by itself, scaled down to a norm of at most C, and given normal noise of variance
(sigma C)^2 / B, so that the sum over the B samples of a step has noise of standard deviation sigma C. Noise belongs to
a slot: a step may be split over micro-batches and workers in any way. Source: Abadi et al., "Deep learning with
differential privacy", 2016, algorithm 1.

What it protects are samples (rows), against whoever sees the trained weights. The noise is a function of the run's
seed: keep the seed as secret as the data.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from resilin.config import component
from resilin.keys import Keys
from resilin.nouns import Batch, Log, Loss, Max, Mean
from resilin.objective.settings import ObjectiveContext, ObjectiveSettings, needed
from resilin.transforms import ObjectiveTransform

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512)
"""Orders of Renyi divergence among which the best is taken."""


class Private(ObjectiveSettings):
    """Any objective, trained with DP-SGD. Set train.clip_norm = 0: each sample is clipped already."""

    objective: Annotated[ObjectiveSettings, component("resilin.objective.next_token:NextToken")] = Field(
        default_factory=dict, validate_default=True
    )
    """What is learnt of each sample."""
    largest: float = Field(default=1.0, gt=0)
    """C: the largest norm of one sample's gradient, over all that is trained."""
    noise: float = Field(default=1.0, ge=0)
    """Sigma: the noise of a step is normal with standard deviation sigma C."""

    def build(self, context: ObjectiveContext | None = None) -> PrivateLoss:
        """The objective.

        Raises:
            ValueError: there is no run to ask how many samples a step has.
        """
        run = needed(context, "Private")
        return PrivateLoss(self, self.objective.build(run), run.source.slots(0))


class PrivateLoss(ObjectiveTransform):
    """Its units are samples. The value is the mean loss of a sample's own units; its gradient is the private one."""

    unit = "samples"

    def __init__(self, settings: Private, inner: object, batch_size: int) -> None:
        """Args:
        settings: of it.
        inner: the objective that each sample is put through.
        batch_size: B, samples of a step.
        """
        super().__init__(inner)  # type: ignore[arg-type]
        self.settings, self.batch_size = settings, batch_size

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss; without a gradient being asked for, that of what is wrapped."""
        if not torch.is_grad_enabled() or keys is None:
            return self.inner(model, batch, keys)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        total = [torch.zeros_like(p) for _, p in trained]
        value, largest, clipped = 0.0, 0.0, 0
        for row in range(len(batch)):
            loss = self.inner(model, batch.rows(row, row + 1), keys.rows(row, row + 1))
            mean = loss.sum / loss.units.clamp(min=1)
            found = torch.autograd.grad(mean, [p for _, p in trained], allow_unused=True)
            gradients = [torch.zeros_like(p) if g is None else g for (_, p), g in zip(trained, found, strict=True)]
            norm = float(torch.stack([g.float().norm() for g in gradients]).norm())
            factor = min(1.0, self.settings.largest / max(norm, 1e-12))
            value, largest, clipped = value + float(mean.detach()), max(largest, norm), clipped + (factor < 1)
            own = keys.rows(row, row + 1).fold("private")
            for (name, _), sum_of, gradient in zip(trained, total, gradients, strict=True):
                sum_of.add_(gradient, alpha=factor)
                if self.settings.noise:
                    scale = self.settings.noise * self.settings.largest / math.sqrt(self.batch_size)
                    noise = own.fold(name).normal(tuple(gradient.shape), gradient.device)[0]
                    sum_of.add_(noise.to(gradient.dtype), alpha=scale)
        # A value whose gradient is the one computed here.
        linear = torch.stack([(p * g).sum() for (_, p), g in zip(trained, total, strict=True)]).sum()
        count = torch.tensor(float(len(batch)), device=linear.device)
        logs: dict[str, Log] = {
            "largest_gradient": Max(torch.tensor(largest)),
            "clipped": Mean(torch.tensor(float(clipped)), torch.tensor(float(len(batch)))),
        }
        return Loss(value + (linear - linear.detach()), count, logs)


def renyi(noise: float, share: float, order: int) -> float:
    """Renyi divergence of one step whose samples are drawn with probability `share` each, for a whole order.

    Source: Mironov, Talwar and Zhang, "Renyi differential privacy of the sampled Gaussian mechanism", 2019.
    """
    if share == 0:
        return 0.0
    if noise == 0:
        return math.inf
    if share == 1:
        return order / (2 * noise**2)
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-share)
        + k * math.log(share)
        + k * (k - 1) / (2 * noise**2)
        for k in range(order + 1)
    ]
    return float(torch.logsumexp(torch.tensor(terms, dtype=torch.float64), 0)) / (order - 1)


def epsilon(noise: float, share: float, steps: int, delta: float) -> float:
    """The epsilon of (epsilon, delta)-differential privacy after some steps; infinite without noise.

    It is that of samples drawn anew, each with probability `share`, in every step; sources that go through shuffled
    data epoch by epoch are close to that, and are commonly accounted so.

    Args:
        noise: sigma.
        share: samples of a step, of all samples there are.
        steps: of the run.
        delta: much smaller than one over the number of samples.

    Raises:
        ValueError: a share or delta outside its range.
    """
    if not 0 <= share <= 1 or not 0 < delta < 1:
        raise ValueError(f"share is {share} and delta {delta}: expected 0 to 1, and between 0 and 1")
    found: list[float] = [steps * renyi(noise, share, order) + math.log(1 / delta) / (order - 1) for order in ORDERS]
    return min(found)
